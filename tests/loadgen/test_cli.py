"""`remoe load` as a user meets it: words, files, exit status; and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loadgen.record import read_records
from remoe.cli import app
from tests.loadgen.servers import null_server

Remoe = Callable[..., Result]
CONSTANT = ("--arrivals", "constant", "--rate", "40", "--duration", "0.5", "--output-tokens", "4")


@pytest.fixture
def remoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remoe:
    monkeypatch.setenv("REMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, ["load", *words])


def test_a_run_prints_its_tables_and_writes_its_folder(
    remoe: Remoe, null_url: str, tmp_path: Path
) -> None:
    done = remoe("--url", null_url, *CONSTANT, "--slo", "ttft_p99<10s", "--usd-per-hour", "2")
    assert done.exit_code == 0, done.output
    for words in ("Requests", "Latency, ms", "schedule lag", "Tokens", "Cost", "SLO", "met"):
        assert words in done.output
    (folder,) = (tmp_path / "results").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "target.json",
        "requests.jsonl",
        "run.json",
        "summary.csv",
        "report.html",
    }
    assert str(folder.relative_to(tmp_path)) in done.output.replace("\n", "")


def test_a_missed_slo_is_an_exit_status(remoe: Remoe, null_url: str) -> None:
    done = remoe("--url", null_url, *CONSTANT, "--slo", "ttft_p50<1ms", "--out", "run")
    assert done.exit_code == 3
    assert "MISSED" in done.output


def test_a_stopped_run_is_an_exit_status(remoe: Remoe) -> None:
    with null_server(ttft_s=30.0) as url:
        done = remoe("--url", url, "--no-probe", "--timeout", "0.2", "--max-errors", "1", *CONSTANT)
    assert done.exit_code == 1
    assert "--max-errors 1" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--window", "5"), "not like 600:1200"),
        (("--window", "9:5"), "not like 600:1200"),
        (("--window", "a:b"), "not like 600:1200"),
        (("--rate", "2"), "--rate needs --duration"),
        (("--rate", "2", "--duration", "3"), "no meaning for trace arrivals"),
        (("--stages", "2@3s"), "no meaning for trace arrivals"),
        (("--stages", "2@3s", "--arrivals", "closed"), "no meaning for closed arrivals"),
        (("--duration", "3"), "use --window instead"),
        (("--sweep", "1,2"), "--sweep needs --duration"),
        (("--slo", "ttft<1"), "needs a unit"),
        (("--arrivals", "gamma", "--stages", "x"), "not like 2@60s"),
        (("--trace", __file__), "no known trace begins with"),
    ],
)
def test_mistakes_are_one_line(remoe: Remoe, words: tuple[str, ...], message: str) -> None:
    done = remoe("--url", "http://127.0.0.1:9/v1", *words)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_the_api_key_is_sent_and_not_written(
    remoe: Remoe, null_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    assert remoe("--url", null_url, *CONSTANT, "--out", "run").exit_code == 0
    for path in (tmp_path / "run").iterdir():
        assert b"sk-very-secret" not in path.read_bytes()


def test_compare_and_report(remoe: Remoe, null_url: str, tmp_path: Path) -> None:
    with null_server(ttft_s=0.08) as slower:
        for name, url in (("fast", null_url), ("slow", slower)):
            done = remoe("--url", url, *CONSTANT, "--out", name)
            assert done.exit_code == 0
    done = remoe("compare", "fast", "slow", "--out", "page.html", "--resamples", "200")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if "TTFT p50" in line)
    assert line.rstrip().endswith("more")
    assert "fast against slow" in (tmp_path / "page.html").read_text()
    before = json.loads((tmp_path / "fast" / "run.json").read_bytes())
    (tmp_path / "fast" / "run.json").unlink()
    assert remoe("report", "fast").exit_code == 0
    assert json.loads((tmp_path / "fast" / "run.json").read_bytes()) == before
    assert "not the folder of a run" in remoe("report", str(tmp_path)).output


def test_describe_says_what_a_trace_holds(remoe: Remoe) -> None:
    output = remoe("describe").output
    assert "remoe-jsonl" in output
    assert "longest silence" in output
    assert "nothing" not in remoe("describe", "--window", "0:10").output


@pytest.mark.slow
def test_a_sweep_stops_when_the_server_does_not_keep_up(
    remoe: Remoe, null_url: str, tmp_path: Path
) -> None:
    words = ("--url", null_url, "--sweep", "10,20,40", "--duration", "1", "--out", "sweep")
    done = remoe(*words, "--output-tokens", "2", "--slo", "request_throughput<17")
    assert done.exit_code == 0, done.output
    assert "Knee: 10 requests/s" in done.output
    assert "request_throughput<17 is missed" in done.output
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [
        "rate-10",
        "rate-20",
        "report.html",
    ]


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_measured(null_url: str, tmp_path: Path, remoe: Remoe) -> None:
    """kill -9 in the middle: every answered request is on disk, and a report can be made."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "remoe.cli", "load", "--url", null_url, "--out", str(out)),
            *("--arrivals", "poisson", "--rate", "50", "--duration", "60", "--output-tokens", "3"),
        ],
        env=os.environ | {"REMOE_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 60
        while not _has_lines(out / "requests.jsonl", 20):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < limit
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    records = list(read_records(out / "requests.jsonl"))
    assert len(records) >= 20
    assert all(record.status == "completed" for record in records)
    assert not (out / "run.json").exists()
    done = remoe("report", str(out))
    assert done.exit_code == 0, done.output
    document = json.loads((out / "run.json").read_bytes())
    assert document["completed"] == len(records)
    assert "the run was cut off" in (out / "report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_run_ends_with_a_report(null_url: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "remoe.cli", "load", "--url", null_url, "--out", str(out)),
            *("--arrivals", "constant", "--rate", "50", "--duration", "60", "--output-tokens", "3"),
        ],
        env=os.environ | {"REMOE_HOME": str(tmp_path / "home"), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not _has_lines(out / "requests.jsonl", 10):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The run was stopped: by you" in output
    assert (out / "report.html").exists()
    assert json.loads((out / "run.json").read_bytes())["completed"] >= 10


def _has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count
