"""Expert times: what the experts of a layer are asked, and the table on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import expert_time
from evaluation.expert_time import rows_for
from evaluation.workbench import Workbench
from remoe.experts import ExpertId


def test_remote_experts_are_asked_the_rows_that_chose_them() -> None:
    chosen = np.array([[0, 1], [1, 3], [3, 0]])
    experts, rows = rows_for(7, [1, 2, 3], chosen, hidden_size=4)
    assert experts == [ExpertId(7, 1), ExpertId(7, 3)]  # nobody chose 2
    assert list(rows.offsets) == [0, 2, 4]
    assert rows.row_index.tolist() == [0, 1, 1, 2]
    assert rows.hidden.shape == (3, 4)
    assert rows_for(7, [2], chosen, hidden_size=4)[0] == []


@pytest.mark.slow
def test_times_fall_with_memory_and_grow_with_the_remote_ratio(history_bench: Workbench) -> None:
    result = expert_time.make(history_bench)
    by_memory = result.series[0]
    vcpus, rows, ms = (by_memory.numbers(name) for name in by_memory.columns)
    one = rows == 32
    assert ms[one][vcpus[one].argmin()] > ms[one][vcpus[one].argmax()]
    by_ratio = result.series[2].named()
    prompt = [row for row in by_ratio if row["tokens"] != 1 and row["routing"] == "uniform"]
    assert [row["ms_a_layer"] for row in prompt if row["remote_ratio"] == 0] == [0.0] * (
        len(prompt) // 5
    )
    assert all(float(row["ms_a_layer"] or 0) > 0 for row in prompt if row["remote_ratio"] != 0)
