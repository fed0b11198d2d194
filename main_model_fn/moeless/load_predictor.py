"""The Load Predictor in the main function: gate copies on the hidden states of the step under way.

Layers hand over what their experts are given and go on; a thread of its own multiplies. While it is
behind, steps are passed over: a prediction that is late is of no use (papers.md B.3).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.moeless.load_book import LoadBook

__all__ = ["LoadPredictor"]

_STOP = None
_Item = tuple[int, torch.Tensor, torch.Tensor]


class LoadPredictor:
    """`gates` are [experts, hidden] by the layer they foretell, given the input of the layer
    `distance` MoE layers before. Of `every` steps one is looked at: on few cores the thread would
    take the time that it is to save.
    """

    def __init__(
        self,
        gates: Mapping[int, torch.Tensor],
        *,
        moe_layers: tuple[int, ...],
        top_k: int,
        distance: int,
        book: LoadBook,
        every: int = 4,
    ) -> None:
        self._gates = dict(gates)
        self._ahead = dict(zip(moe_layers, moe_layers[distance:], strict=False))
        self._first = moe_layers[0]
        self._top_k = top_k
        self._book = book
        self._every = every
        self._count = 0
        self._watching = False
        self._expected: dict[int, NDArray[np.bool_]] = {}
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._most_waiting = 2 * len(moe_layers)
        self._thread = threading.Thread(target=self._run, name="load-predictor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._items.put(_STOP)
        self._thread.join()

    def observe(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Take a layer's input [tokens, hidden] and its routes [tokens, top_k]; never waits."""
        if layer == self._first:
            self._watching = (
                self._count % self._every == 0 and self._items.qsize() < self._most_waiting
            )
            self._count += 1
        if self._watching:
            self._items.put((layer, hidden, index))

    def _run(self) -> None:
        while (item := self._items.get()) is not _STOP:
            with torch.inference_mode():
                self.look_at(*item)

    def look_at(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Note a layer's routes, and foretell those of the layer ahead."""
        if layer == self._first:
            self._expected.clear()
        chosen = index.cpu().numpy()
        target = self._ahead.get(layer)
        gate = None if target is None else self._gates.get(target)
        if target is not None and gate is not None:
            logits = hidden.float() @ gate.T  # [tokens, experts]
            top = logits.topk(self._top_k, dim=-1).indices.cpu().numpy()
            expected = np.zeros(logits.shape, np.bool_)
            np.put_along_axis(expected, top, values=True, axis=1)
            self._expected[target] = expected
            self._book.foretell(target, expected.sum(0).astype(np.float64))
        before = self._expected.pop(layer, None)
        overlap = None
        if before is not None and len(before) == len(chosen) and len(chosen):
            overlap = float(np.take_along_axis(before, chosen, axis=1).mean())
        counts = np.bincount(chosen.ravel(), minlength=self._book.experts)
        self._book.record(layer, counts.astype(np.float64), overlap=overlap)
