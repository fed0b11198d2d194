"""Times of calls: measured through a real expert function, and taken from where they were made."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from remoe.cli.hardware.functions import measure_local_calls
from remoe.errors import SettingsError
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
