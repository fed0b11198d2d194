"""The remote calls of a native step's layers that leave and return within it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.metering import StepMeter
from main_model_fn.split import LayerExperts
from remoe.kernel.structures import ANSWERED

__all__ = ["StepCalls"]


class StepCalls:
    """Of `splits`, whose rows are [width] of `dtype`, for one step."""

    def __init__(
        self,
        splits: Sequence[LayerExperts],
        meter: StepMeter,
        *,
        dtype: torch.dtype,
        width: int,
        top_k: int,
    ) -> None:
        self._splits = splits
        self._meter = meter
        self.lines = [split.line(dtype, width, top_k) for split in splits]
        self._distinct = list(dict.fromkeys(line for line in self.lines if line is not None))

    @property
    def numbers(self) -> list[int]:
        """What functions know the layers by."""
        return [split.layer for split in self._splits]

    def open(self) -> None:
        """Before the step goes on: let it use the lines that can be used."""
        if self._meter.trace is not None:  # each call has a span of its own, which it names
            for line in self._distinct:
                line.close()
            return
        now = time.monotonic()
        remaining_s = self._meter.remaining_s(now)
        for line in self._distinct:
            line.open(now, remaining_s)

    def book(self, answers: NDArray[np.void]) -> None:
        """After the step: `answers`, one a layer, of the library's `ANSWER`."""
        for place in np.flatnonzero(answers["state"] == ANSWERED).tolist():
            self._splits[place].book(answers[place])
