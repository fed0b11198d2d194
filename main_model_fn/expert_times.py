"""What one expert takes on this machine's CPU and GPU, and on its way between: measured at start.

Nothing else knows what these processors, this link and this kernel do together. Half a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.device_experts import expert_output
from main_model_fn.placement import ExpertTimes
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.activation import Activation
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.kernel.native_kernel import NativeKernel

__all__ = ["measure_times"]

_ROWS = (1, 4, 16, 64, 256)
_AT_ONCE = 8  # experts in one call: a call's own time is told from theirs
_ON_GPU = 4
_REPEATS = 5


def measure_times(
    kernel: NativeKernel,
    experts: Mapping[ExpertId, ExpertWeights],
    staging: Staging,
    device: torch.device,
    activation: Activation,
) -> ExpertTimes:
    """Compute these experts, which lie in the host's memory, on random rows.

    They are taken by turns, so that with enough of them each call finds its weights in memory, not
    in a cache; and the CPU's are measured beside copies, which read the same memory.
    """
    weights = list(experts.values())
    hidden, dtype = weights[0].down.shape[0], weights[0].down.dtype
    sample = torch.randn((max(_ROWS), hidden), generator=torch.Generator().manual_seed(0))
    rows = {count: sample[:count].to(dtype) for count in _ROWS}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def copies(count: int) -> None:
        for index in range(count):
            staging.send(weights[index % len(weights)])
            with staging.take():
                pass

    turns = _Turns(list(experts))
    many = min(_AT_ONCE, len(weights))

    def on_cpu(count: int, at_once: int) -> float:
        calls = iter([_call(rows[count], turns.take(at_once)) for _ in range(_REPEATS)])
        sums = torch.zeros((count, hidden))

        def run() -> None:
            ids, routed = next(calls)
            kernel.start(ids, routed, sums.numpy())()

        took = list[float]()
        for _ in range(_REPEATS):
            copies(_AT_ONCE)
            took.append(_seconds(run))
            wait()
        return statistics.median(took)

    back = torch.zeros((1, hidden), pin_memory=device.type == "cuda")
    one_s, many_s = on_cpu(1, 1), on_cpu(1, many)
    each_s = (many_s - one_s) / (many - 1) if many > 1 else one_s
    each_s = min(max(each_s, one_s / many), one_s)
    call_s = one_s - each_s
    there = [one.to(device) for one in weights[:_ON_GPU]]

    def on_gpu(count: int) -> float:
        x = rows[count].to(device)

        def run() -> None:
            for one in there:
                expert_output(x, one, activation)
            wait()

        run()
        return _median_s(run) / len(there)

    return ExpertTimes(
        rows=_ROWS,
        cpu_s=[each_s, *(max(on_cpu(n, many) - call_s, 0.0) / many for n in _ROWS[1:])],
        gpu_s=[on_gpu(count) for count in _ROWS],
        copy_s=_median_s(lambda: (copies(_AT_ONCE), wait())) / _AT_ONCE,
        cpu_start_s=call_s + _median_s(lambda: (back.to(device), wait())),
    )


class _Turns:
    def __init__(self, experts: list[ExpertId]) -> None:
        self._experts = experts
        self._next = 0

    def take(self, count: int) -> list[ExpertId]:
        taken = [self._experts[(self._next + i) % len(self._experts)] for i in range(count)]
        self._next += count
        return taken


def _call(rows: torch.Tensor, ids: list[ExpertId]) -> tuple[list[ExpertId], RoutedRows]:
    """Each row through each of the experts."""
    count = len(rows)
    stored: NDArray[np.generic] = (
        rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    ).numpy()
    return ids, RoutedRows(
        hidden=stored,
        offsets=range(0, count * len(ids) + 1, count),
        row_index=np.tile(np.arange(count, dtype=np.int32), len(ids)),
        gate=np.ones(count * len(ids), np.float32),
    )


def _median_s(run: Callable[[], object]) -> float:
    return statistics.median(_seconds(run) for _ in range(_REPEATS))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
