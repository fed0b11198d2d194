"""A forward pass as CUDA graphs, cut where the host has to compute something in between.

What runs is the library's own code, captured once: the same kernels in the same order, without its
Python and with one launch for all that lies between two cuts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

__all__ = ["Cut", "Forward", "Segments", "nothing_freed", "segments"]

Cut = Callable[[], None]
Forward = Callable[[Cut], torch.Tensor]
"""A pass that calls what it is given wherever it is to be cut."""


class Segments(Protocol):
    """A pass over tensors that stay where they are."""

    def run(self, between: Callable[[int], None]) -> torch.Tensor:
        """Run all of it; at each cut, by its number, what was asked for has happened.

        The result is overwritten by the next run.
        """
        ...


class _Eager:
    """Without a GPU: the pass itself, each time."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def run(self, between: Callable[[int], None]) -> torch.Tensor:
        cuts = 0

        def cut() -> None:
            nonlocal cuts
            between(cuts)
            cuts += 1

        return self._forward(cut)


class _Captured:
    """Graphs of one pool of memory: what one leaves for a later one stays where it is."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # Its own: other passes are run between two cuts of this one.
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), nothing_freed():
            forward(lambda: None)  # libraries choose their kernels and take their memory
            stream.synchronize()
            try:
                self._begin()
                self._output = forward(self._cut)
                self._graphs[-1].capture_end()
            except BaseException:
                with suppress(RuntimeError):
                    self._graphs[-1].capture_end()
                _end_capturing(device)
                raise
        torch.cuda.current_stream(device).wait_stream(stream)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        # Other threads go on with what they do on the GPU.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _cut(self) -> None:
        self._graphs[-1].capture_end()
        self._begin()

    def run(self, between: Callable[[int], None]) -> torch.Tensor:
        *before, last = self._graphs
        for number, graph in enumerate(before):
            graph.replay()
            self._event.record()
            self._event.synchronize()
            between(number)
        last.replay()
        return self._output


def _end_capturing(device: torch.device) -> None:
    """After a capture that failed torch's random numbers take it to go on, until one has not."""
    graph = torch.cuda.CUDAGraph()
    with suppress(RuntimeError):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()


@contextmanager
def nothing_freed() -> Iterator[None]:
    """Around captures: other graphs that nobody has any more would end them if they went then."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def segments(forward: Forward, device: torch.device) -> Segments:
    """A pass, captured if the device is a GPU; RuntimeError if it cannot be."""
    return _Eager(forward) if device.type != "cuda" else _Captured(forward, device)
