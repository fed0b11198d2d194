"""The tables that start real processes: what they start with, and each in a short form."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from evaluation import cold_start, cost, replay
from evaluation.page_cache import cached_share, drop, warm
from evaluation.platform import Deployed, platform
from evaluation.workbench import Options, Workbench
from loadgen.schedule import build_workload
from remoe.errors import SettingsError, UnavailableError


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_files_leave_the_page_cache_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\1" * (8 << 20))
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "weights").open("rb") as file:
        os.fsync(file.fileno())  # what is not written yet stays
    drop(tmp_path)
    assert cached_share(tmp_path) < 0.1
    warm(tmp_path)
    assert cached_share(tmp_path) == 1
    assert cached_share(tmp_path / "nothing") == 0


def test_a_platform_that_does_not_start_says_why(tmp_path: Path) -> None:
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path / "none", port=_free_port()), "cost")
    with (
        pytest.raises(UnavailableError, match="did not start"),
        platform(bench, Deployed(name="x")),
    ):
        pass
    with (
        pytest.raises(SettingsError, match="--hardware"),
        platform(bench, Deployed(name="x", planned=True)),
    ):
        pass


def test_what_listens_already_is_not_measured(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, port=port), "cost")
        with (
            pytest.raises(SettingsError, match=f"port {port} is taken"),
            platform(bench, Deployed(name="x")),
        ):
            pass


def test_a_folder_without_the_traces_is_told(tmp_path: Path) -> None:
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, traces=tmp_path), "replay")
    with pytest.raises(SettingsError, match=r"no AzureLLMInferenceTrace_code\.csv"):
        replay.replayed(bench)


def _write_traces(folder: Path, seconds: range) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [
        f"2023-11-16 18:{15 + second // 60:02}:{second % 60:02}.0000000,1000,100"
        for second in seconds
    ]
    for kind in ("code", "conv"):
        path = folder / f"AzureLLMInferenceTrace_{kind}.csv"
        path.write_text("\r\n".join(rows), encoding="utf-8")


def test_the_short_replay_takes_two_minutes(tmp_path: Path) -> None:
    _write_traces(tmp_path, range(0, 2400, 3))
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, traces=tmp_path, quick=True), "r")
    ((path, config),) = replay.replayed(bench).values()
    workload = build_workload(msgspec.structs.replace(config, trace=path, sample=1.0))
    assert 110 < workload.span_s <= 120
    assert max(request.prompt_tokens or 0 for request in workload.requests) == 128
    bench = Workbench(Options(out=tmp_path, model_dir=tmp_path, traces=tmp_path), "r")
    assert list(replay.replayed(bench)) == ["code", "conversation"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cold_starts_by_stage(history_bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_start, "_CACHES", ("cold",))  # half the time
    rows = cold_start.make(history_bench).series[0].named()
    assert {row["way"] for row in rows} >= {"Remoe", "MIX", "CPU"}
    assert {row["stage"] for row in rows if row["way"] == "Remoe"} == {
        "libraries",
        "model and cache",
        "plan",
        "remote: process",
        "remote: first call",
    }
    assert all(float(row["total_s"] or 0) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_request_is_priced_end_to_end(history_bench: Workbench) -> None:
    bench = Workbench(replace(history_bench.options, port=_free_port()), "cost")
    measured = cost.make(bench).series[2].named()
    assert [row["requests"] for row in measured] == [3, 3]
    half, mix = measured
    assert mix["hit_rate"] == 1
    assert float(half["hit_rate"] or 0) < 1
    assert float(half["calls_a_token"] or 0) > 0
    assert all(float(row["usd"] or 0) > 0 for row in measured)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whole", [False, True], ids=["in seconds", "two minutes"])
def test_a_replay(
    history_bench: Workbench,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
) -> None:
    if whole and not pytestconfig.getoption("--nightly"):
        pytest.skip("takes minutes: --nightly")
    _write_traces(tmp_path, range(0, 1200, 10 if whole else 60))
    faster = msgspec.structs.replace(
        replay.TWO_MINUTES, sample=1.0, speedup=10.0 if whole else 300.0
    )
    monkeypatch.setattr(replay, "TWO_MINUTES", faster)
    options = replace(history_bench.options, port=_free_port(), traces=tmp_path)
    runs = replay.make(Workbench(options, "replay")).series[0].named()
    assert [row["failed"] for row in runs] == [0, 0]
    assert [row["completed"] for row in runs] == [120 if whole else 20] * 2
    assert all(float(row["resident_usd"] or 0) > 0 for row in runs)
