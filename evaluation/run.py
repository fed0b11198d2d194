"""Make tables one after another into a results folder, and one page of all that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from evaluation.machine import machine_facts
from evaluation.results import Comparison, comparison_lines, write_result
from evaluation.tables import TABLES, Table
from evaluation.workbench import Options, Workbench
from remoe.errors import RemoeError

__all__ = ["run_tables", "write_index"]


@dataclass(frozen=True, slots=True)
class Failure:
    table: str
    why: str


def run_tables(
    tables: Sequence[Table], options: Options, say: Callable[[str], None]
) -> list[Failure]:
    """Make each table; one that cannot be made is told and the others go on."""
    failures: list[Failure] = []
    for place, table in enumerate(tables, start=1):
        prefix = f"[{place}/{len(tables)}] {table.name}"
        say(f"{prefix}: {table.title}")
        bench = Workbench(options, table.name, lambda text, p=prefix: say(f"{p}: {text}"))  # type: ignore[misc]
        before = machine_facts()
        try:
            result = table.make(bench)
        except RemoeError as error:
            failures.append(Failure(table.name, error.message))
            say(f"{prefix}: {error.message}")
            continue
        facts = {
            **machine_facts(),
            "load_1min_before": before["load_1min"],
            "quick": options.quick,
            "items_reused": len(bench.reused),
        }
        write_result(result, bench.folder, name=table.name, title=table.title, facts=facts)
        write_index(options.out)
        for one in result.comparisons:
            say(f"{prefix}: {one.what}: paper {one.paper or '-'}, ours {one.ours}")
    return failures


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the page needs of a result.json."""

    title: str
    facts: dict[str, str | int | float | bool | None]
    comparisons: list[Comparison]


def write_index(out: Path) -> Path:
    """One page over all results in the folder; returns its path."""
    lines = ["# Evaluation", ""]
    for table in TABLES:
        path = out / table.name / "result.json"
        if not path.exists():
            continue
        result = msgspec.json.decode(path.read_bytes(), type=_Result)
        facts = result.facts
        machine = ", ".join(
            f"{label}{facts.get(key)}"
            for key, label in (
                ("cpu", ""),
                ("cores", "cores "),
                ("gpu", "GPU "),
                ("load_1min", "load "),
                ("at", ""),
                ("commit", "commit "),
            )
            if facts.get(key) is not None
        )
        lines += [
            f"## [{result.title}]({table.name}/table.md)",
            "",
            f"`remoe evaluate {table.name}{' --quick' if facts.get('quick') else ''}`: {machine}",
            "",
            *comparison_lines(result.comparisons),
            "",
        ]
    page = out / "index.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page
