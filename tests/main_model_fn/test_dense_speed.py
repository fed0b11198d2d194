"""What is measured without experts is what serves, and has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from main_model_fn import dense_speed
from main_model_fn.dense_speed import measure_dense
from remoe.kernel.native_kernel import ExpertTable
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Decoding
from tests.tiny_families import build_tiny_family


@pytest.mark.parametrize(("family", "together"), [("mixtral", True), ("qwen2_moe", False)])
def test_a_step_is_the_engines_and_calls_no_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, together: bool
) -> None:
    stops = list[int]()
    decode = NativePool.decode

    def counted(pool: NativePool, step: Decoding) -> None:
        decode(pool, step)
        stops.append(step.layer)

    def refused(*_: object) -> None:
        raise AssertionError("an expert was computed")

    monkeypatch.setattr(NativePool, "decode", counted)
    monkeypatch.setattr(NativePool, "decode_here", refused)
    monkeypatch.setattr(ExpertTable, "add", refused)
    monkeypatch.setattr(dense_speed, "_STEPS", 4)
    model_dir = build_tiny_family(tmp_path, family)
    stops.clear()  # of the comparisons at load
    found = measure_dense(model_dir, rows=[1, 40], seconds=0.01)
    assert found.rows == [1, 40]
    assert all(seconds > 0 for seconds in (*found.prefill_s, found.step_s))
    assert (max(stops, default=0) > 1) == together
