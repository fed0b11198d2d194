"""The Load Predictor in the main function: gate copies on the hidden states of the step under way.

Layers hand over what their experts are given and go on; a thread of its own multiplies, with a GPU
on a stream of its own (papers.md B.3). Only while they are watched: steps that nobody looks at may
be computed in ways that have no layers to watch, such as all of them in one native call.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch

from main_model_fn.moeless.load_book import LoadBook

__all__ = ["LoadPredictor", "Observer"]

_STOP = None
_Item = tuple[int, torch.Tensor, torch.Tensor, torch.cuda.Event | None]
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
        self._expected: dict[int, torch.Tensor] = {}
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
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
            ready = None
            if hidden.is_cuda:
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            self._items.put((layer, hidden, index, ready))
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
            layer, hidden, index, ready = item
            with torch.inference_mode():
                if ready is None:
                    self.look_at(layer, hidden, index)
                else:
                    self._look_beside(layer, hidden, index, ready)

    def _look_beside(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, ready: torch.cuda.Event
    ) -> None:
        """The same beside what the GPU computes, once it has computed what is looked at."""
        stream = self._stream
        if stream is None:
            stream = self._stream = torch.cuda.Stream(hidden.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            ready.wait(stream)
            for tensor in (hidden, index):
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # nobody else gets its memory before
            self.look_at(layer, hidden, index)

    def look_at(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Note a layer's routes, and foretell those of the layer ahead; one copy from a GPU."""
        if layer == self._first:
            self._expected.clear()
        counted = [self._loads(index)]
        target = self._ahead.get(layer)
        gate = None if target is None else self._gates.get(target)
        if target is not None and gate is not None:
            top = (hidden.to(gate.dtype) @ gate.T).topk(self._top_k, dim=-1).indices
            self._expected[target] = top  # [tokens, top_k]
            counted.append(self._loads(top))
        before = self._expected.pop(layer, None)
        known = False
        if before is not None and len(before) == len(index) > 0:
            known = True
            hits = (before[:, :, None] == index[:, None, :]).any(1)
            counted.append(hits.float().mean()[None])
        values = torch.cat(counted).cpu().numpy().astype(np.float64)
        experts = self._book.experts
        if target is not None and gate is not None:
            self._book.foretell(target, values[experts : 2 * experts])
        self._book.record(layer, values[:experts], overlap=float(values[-1]) if known else None)

    def _loads(self, routes: torch.Tensor) -> torch.Tensor:
        """Of [tokens, top_k] experts: how many tokens each has, [experts]."""
        flat = routes.reshape(-1)
        zeros = torch.zeros(self._book.experts, device=flat.device)
        return zeros.scatter_add_(0, flat, torch.ones_like(flat, dtype=zeros.dtype))
