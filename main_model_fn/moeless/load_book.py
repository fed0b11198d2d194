"""Loads a step: as foretold, as they came, and how well the one told the other. Thread-safe."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LoadBook", "LoadView"]

_WEIGHT = 0.25  # of the newest step in the running means


@dataclass(frozen=True, slots=True)
class LoadView:
    """`loads` are the routes that a step expects, [layers, experts]; `steps` is how many steps were
    seen. `overlap` [layers] is the share of routes foretold rightly, NaN where nothing is known."""

    loads: NDArray[np.float64]
    overlap: NDArray[np.float64]
    steps: int


class LoadBook:
    """Running means by layer: of foretold loads where there are any, else of those that came.

    For the first layers nothing is foretold in flight: the last steps' loads stand (papers.md B.3).
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.experts = experts
        self._lock = threading.Lock()
        self._actual = np.zeros((layers, experts))
        self._foretold = np.zeros((layers, experts))
        self._is_foretold = np.zeros(layers, np.bool_)
        self._overlap = np.full(layers, np.nan)
        self._steps = np.zeros(layers, np.intp)

    def foretell(self, layer: int, loads: NDArray[np.float64]) -> None:
        """A step will route so many tokens to each expert of a layer: [experts]."""
        with self._lock:
            first = not self._is_foretold[layer]
            self._is_foretold[layer] = True
            _mix(self._foretold[layer], loads, first=first)

    def record(
        self, layer: int, loads: NDArray[np.float64], *, overlap: float | None = None
    ) -> None:
        """A step has; `overlap` is the share of these routes that had been foretold."""
        with self._lock:
            _mix(self._actual[layer], loads, first=self._steps[layer] == 0)
            self._steps[layer] += 1
            if overlap is not None:
                known = self._overlap[layer]
                self._overlap[layer] = (
                    overlap if np.isnan(known) else (1 - _WEIGHT) * known + _WEIGHT * overlap
                )

    def view(self) -> LoadView:
        with self._lock:
            loads = np.where(self._is_foretold[:, None], self._foretold, self._actual)
            return LoadView(loads, self._overlap.copy(), int(self._steps.max(initial=0)))


def _mix(mean: NDArray[np.float64], new: NDArray[np.float64], *, first: bool) -> None:
    if first:
        mean[:] = new
    else:
        mean += _WEIGHT * (new - mean)
        mean[mean < 1e-3] = 0  # unused for so long that it counts as not used
