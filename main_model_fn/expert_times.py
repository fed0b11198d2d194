"""What one expert takes on this machine's CPU and GPU, and on its way between: measured at start.

Nothing else knows what these processors, this link and this kernel do together. Half a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.device_experts import expert_output
from main_model_fn.pinned_experts import slices_of
from main_model_fn.placement import ExpertTimes
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.activation import Activation
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows
from remoe.kernel.native_kernel import NativeKernel

__all__ = ["measure_times"]

_ROWS = (1, 4, 16, 64, 256)
_AT_ONCE = 8  # experts in one call: what a call takes besides is told from what they take
_ON_GPU = 4
_REPEATS = 7
_WARM_UP_S = 0.1


def measure_times(
    kernel: NativeKernel,
    experts: Mapping[ExpertId, ExpertWeights],
    staging: Staging,
    device: torch.device,
    activation: Activation,
) -> ExpertTimes:
    """Compute these experts, which lie in the host's memory, on random rows."""
    trial = _Trial(kernel, experts, staging, device)
    many = min(_AT_ONCE, len(experts))
    trial.warm_up()
    one_s, many_s = trial.cpu_s(1, 1), trial.cpu_s(1, many)
    each_s = (many_s - one_s) / (many - 1) if many > 1 else one_s
    each_s = min(max(each_s, one_s / many), one_s)
    call_s = one_s - each_s
    more = [max(trial.cpu_s(rows, many) - call_s, 0.0) / many for rows in _ROWS[1:]]
    return ExpertTimes(
        rows=_ROWS,
        cpu_s=[each_s, *more],
        gpu_s=[trial.gpu_s(rows, activation) for rows in _ROWS],
        copy_s=trial.copy_s(),
        cpu_start_s=call_s + trial.back_s(),
    )


class _Trial:
    """Experts are taken by turns: with enough of them each call finds its weights in no cache."""

    def __init__(
        self,
        kernel: NativeKernel,
        experts: Mapping[ExpertId, ExpertWeights],
        staging: Staging,
        device: torch.device,
    ) -> None:
        self._kernel = kernel
        self._turns = cycle(experts)
        self._weights = list(experts.values())
        self._slices = self._weights[0].slices
        self._staging = staging
        self._device = device
        down, (_, hidden) = self._weights[0].down, self._weights[0].shape
        generator = torch.Generator().manual_seed(0)
        self._sample = torch.randn((max(_ROWS), hidden), generator=generator).to(down.dtype)

    def warm_up(self) -> None:
        """Until this no thread has read these pages: the first calls take several times as long."""
        began = time.perf_counter()
        while time.perf_counter() - began < _WARM_UP_S:
            self._start(_AT_ONCE, 1)()

    def _start(self, experts: int, rows: int) -> Callable[[], None]:
        """Begin computing so many rows through each of the next experts on the CPU."""
        ids = [
            part for one in islice(self._turns, experts) for part in slices_of(one, self._slices)
        ]
        call = _each_row_through_all(self._sample[:rows], len(ids))
        return self._kernel.start(ids, call, np.zeros((rows, self._sample.shape[1]), np.float32))

    def cpu_s(self, rows: int, experts: int) -> float:
        """So many rows through each of some experts, beside copies: they read the same memory."""
        took = list[float]()
        for _ in range(_REPEATS):
            self._copies(_AT_ONCE)
            began = time.perf_counter()
            self._start(experts, rows)()
            took.append(time.perf_counter() - began)
            self._wait()
        return statistics.median(took)

    def gpu_s(self, rows: int, activation: Activation) -> float:
        """One expert whose weights are there, of several asked for one after another."""
        there = [one.to(self._device) for one in self._weights[:_ON_GPU]]
        sample = self._sample[:rows].to(self._device)

        def run() -> None:
            for one in there:
                expert_output(sample, one, activation)
            self._wait()

        run()
        return _median_s(run) / len(there)

    def copy_s(self) -> float:
        """One expert's weights to the GPU, beside the CPU, which reads the same memory."""
        took = list[float]()
        for _ in range(_REPEATS):
            finish = self._start(2 * _AT_ONCE, 1)
            took.append(_seconds(self._copied))
            finish()
        return statistics.median(took) / _AT_ONCE

    def _copied(self) -> None:
        self._copies(_AT_ONCE)
        self._wait()

    def back_s(self) -> float:
        """A row's sums to the GPU."""
        sums = torch.zeros((1, self._sample.shape[1]), pin_memory=self._device.type == "cuda")

        def run() -> None:
            sums.to(self._device)
            self._wait()

        return _median_s(run)

    def _copies(self, count: int) -> None:
        for weights in islice(cycle(self._weights), count):
            self._staging.send(weights)
            with self._staging.take():
                pass

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _each_row_through_all(rows: torch.Tensor, experts: int) -> RoutedRows:
    count = len(rows)
    stored: NDArray[np.generic] = (
        rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    ).numpy()
    return RoutedRows(
        hidden=stored,
        offsets=range(0, count * experts + 1, count),
        row_index=np.tile(np.arange(count, dtype=np.int32), experts),
        gate=np.ones(count * experts, np.float32),
    )


def _median_s(run: Callable[[], object]) -> float:
    return statistics.median(_seconds(run) for _ in range(_REPEATS))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
