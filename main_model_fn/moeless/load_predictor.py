"""The Load Predictor in the main function: gate copies on the hidden states of the step under way.

Layers hand over what their experts are given and go on; a thread of its own multiplies (papers.md
B.3). Only while they are watched: steps that nobody looks at may be computed in ways that have no
layers to watch, such as all of them in one native call.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from main_model_fn.moeless.load_book import LoadBook

__all__ = ["LoadPredictor", "Observer"]

_STOP = None
_Item = tuple[int, torch.Tensor, torch.Tensor]
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


class LoadPredictor:
    """`gates` are [experts, hidden] by the layer they foretell, given the input of the layer
    `distance` MoE layers before. A step is looked at, and `period_s` after it the next: more of them
    would take the time that they are to save. `watch` is told by whom the layers' inputs are wanted.
    """

    def __init__(
        self,
        gates: Mapping[int, torch.Tensor],
        *,
        moe_layers: tuple[int, ...],
        top_k: int,
        distance: int,
        book: LoadBook,
        watch: Callable[[Observer | None], None],
        period_s: float = 1.0,
    ) -> None:
        self._gates = dict(gates)
        self._ahead = dict(zip(moe_layers, moe_layers[distance:], strict=False))
        self._first, self._last = moe_layers[0], moe_layers[-1]
        self._top_k = top_k
        self._book = book
        self._watch = watch
        self._period_s = period_s
        self._begun = False
        self._expected: dict[int, NDArray[np.bool_]] = {}
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="load-predictor", daemon=True)

    def start(self) -> None:
        self._watch(self.observe)
        self._thread.start()

    def stop(self) -> None:
        self._items.put(_STOP)
        self._thread.join()
        self._watch(None)

    def observe(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Take a layer's input [tokens, hidden] and its routes [tokens, top_k]; never waits.

        Of a step that was under way when watching began, nothing is taken; after a whole one it ends.
        """
        self._begun = self._begun or layer == self._first
        if self._begun:
            self._items.put((layer, hidden, index))
            if layer == self._last:
                self._begun = False
                self._watch(None)

    def _run(self) -> None:
        while True:
            try:
                item = self._items.get(timeout=self._period_s)
            except queue.Empty:
                self._watch(self.observe)
                continue
            if item is _STOP:
                return
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
