"""Times of calls: measured through a real expert function, and taken from where they were made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from main_model_fn.call_times import measure_calls
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import FunctionProcess, layers_env, measure_local_calls
from remoe.errors import ExpertUnavailableError, SettingsError
from remoe.expert_call import TOKEN_VARIABLE
from remoe.hardware import CallTimes


def test_measured_calls_come_back_from_their_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    times = measure_local_calls(tiny_model_dir)
    assert 0 < times.invocation.median_s <= times.invocation.p95_s < 1
    assert times.bandwidth_bytes_per_s > 0
    path = tmp_path / "calls.json"
    path.write_bytes(msgspec.json.encode(times))
    assert CallTimes.load(path) == times


def test_a_file_of_something_else_says_where_to_get_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    path.write_text("{}")
    with pytest.raises(SettingsError, match=r"main_model_fn\.call_times"):
        CallTimes.load(path)


def test_calls_are_made_with_the_token_that_the_function_asks_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    checkpoint = Checkpoint.open(tiny_model_dir)
    env = layers_env(checkpoint)
    with FunctionProcess("expert_fn", tiny_model_dir, tmp_path, env) as function:
        function.start()
        command = [sys.executable, "-m", "main_model_fn.call_times", "--calls", "4"]
        topology = {"REMOE_TOPOLOGY": str(tmp_path / "expert_fn-topology.json")}
        done = subprocess.run(
            [*command, "--url", function.url],
            env={**os.environ, **topology},
            capture_output=True,
            check=True,
        )
        assert msgspec.json.decode(done.stdout, type=CallTimes).invocation.median_s > 0
        with pytest.raises(ExpertUnavailableError, match=TOKEN_VARIABLE):
            measure_calls(function.topology, calls=1)
