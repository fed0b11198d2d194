"""Tables in general: what is kept, what is written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.results import Comparison, Picture, Series, TableResult, write_result
from evaluation.run import run_tables, write_index
from evaluation.tables import TABLES, Table, chosen
from evaluation.workbench import Options, Workbench
from loadgen.plots.style import figure
from remoe.cli import app
from remoe.errors import SettingsError


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(Options(out=tmp_path, model_dir=tmp_path), "some")


def test_an_item_is_worked_on_once_and_read_back_as_it_was(bench: Workbench) -> None:
    worked: list[int] = []

    def work() -> Series:
        worked.append(1)
        return Series(name="s", columns=["a"], rows=[[1.5], [None]])

    first = bench.item("item", {"n": 1}, work, Series)
    again = bench.item("item", {"n": 1}, work, Series)
    assert first == again == Series(name="s", columns=["a"], rows=[[1.5], [None]])
    assert len(worked) == 1
    assert bench.reused == ["item"]


def test_other_inputs_are_worked_on_anew(bench: Workbench) -> None:
    assert bench.item("item", {"n": 1}, lambda: 10, int) == 10
    assert bench.item("item", {"n": 2}, lambda: 20, int) == 20
    assert bench.item("item", {"n": 1}, lambda: 30, int) == 10


def test_fresh_works_again(tmp_path: Path) -> None:
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, fresh=True), "some")
    assert bench.item("item", 1, lambda: 1, int) == 1
    assert bench.item("item", 1, lambda: 2, int) == 2


def test_work_that_fails_leaves_nothing(bench: Workbench) -> None:
    def fail() -> int:
        raise SettingsError("no")

    with pytest.raises(SettingsError):
        bench.item("item", 1, fail, int)
    assert bench.item("item", 1, lambda: 5, int) == 5


def test_a_result_is_written_as_json_csv_svg_and_markdown(tmp_path: Path) -> None:
    drawn, _ = figure()
    result = TableResult(
        comparisons=[
            Comparison(what="x", paper="57 %", ours="40 %", same_setting=False, gap="no GPU")
        ],
        series=[Series(name="data", columns=["a", "b"], rows=[["x", 1.5], ["y", None]])],
        pictures=[Picture("plot", "A plot.", drawn)],
        notes=["Noted."],
    )
    write_result(result, tmp_path / "t", name="t", title="T", facts={"cores": 2})
    assert (tmp_path / "t" / "data.csv").read_text().splitlines() == ["a,b", "x,1.5", "y,"]
    assert "<svg" in (tmp_path / "t" / "plot.svg").read_text()
    page = (tmp_path / "t" / "table.md").read_text()
    assert "| x | 57 % | 40 % | no | no GPU |" in page
    assert "![A plot.](plot.svg)" in page
    assert "| y | - |" in page


def test_a_table_that_cannot_be_made_is_told_and_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (Table(name, name.title(), "none") for name in ("bad", "good"))

    def make(table: Table, bench: Workbench) -> TableResult:
        if table.name == "bad":
            raise SettingsError("nothing to make it of")
        return TableResult(
            comparisons=[Comparison(what="w", paper=None, ours="1", same_setting=True, gap="none")],
            series=[],
        )

    monkeypatch.setattr(Table, "make", make)
    monkeypatch.setattr("evaluation.run.TABLES", (bad, good))
    said: list[str] = []
    failures = run_tables(
        [bad, good], Options(out=tmp_path, model_dir=tmp_path, quick=True), said.append
    )
    assert [(failure.table, failure.why) for failure in failures] == [
        ("bad", "nothing to make it of")
    ]
    index = write_index(tmp_path).read_text()
    assert "## [Good](good/table.md)" in index
    assert "`remoe evaluate good --quick`" in index
    assert "Bad" not in index


def test_tables_are_chosen_in_the_papers_order() -> None:
    assert chosen([]) == list(TABLES)
    assert chosen([TABLES[1].name, TABLES[0].name]) == list(TABLES[:2])
    with pytest.raises(SettingsError, match=r"no table cots\. There are similarity, "):
        chosen(["cots"])


def test_the_commands_help_names_every_table() -> None:
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output
    assert ", ".join(table.name for table in TABLES) + "." in shown


def test_the_command_makes_a_table_and_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(table: Table, bench: Workbench) -> TableResult:
        return TableResult(comparisons=[], series=[])

    monkeypatch.setattr(Table, "make", make)
    words = ["evaluate", TABLES[0].name, "--quick", "--model-dir", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "index.md") in done.output
    assert (tmp_path / "out" / TABLES[0].name / "result.json").exists()
    refused = CliRunner().invoke(app, ["evaluate", "cots", "--model-dir", str(tmp_path)])
    assert refused.exit_code == 1
    assert "no table cots" in refused.output
