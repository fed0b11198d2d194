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

__all__ = ["Cut", "Forward", "Host", "Segments", "nothing_freed", "segments"]


class Cut(Protocol):
    """Where a pass is cut: `handed` when what the host waits for is there, then the cut itself.

    What lies between the two is computed while the host works.
    """

    def handed(self) -> None: ...

    def __call__(self) -> None: ...


Forward = Callable[[Cut], torch.Tensor]
"""A pass that calls both of what it is given wherever it is to be cut."""


class Host(Protocol):
    """What the host does at a pass's cuts, by their numbers."""

    def prepare(self, cut: int) -> None:
        """Before anything was handed over: the GPU is on its way there."""
        ...

    def begin(self, cut: int) -> None:
        """With what was handed over. What follows the cut is asked for when this returns.

        The current stream is to wait for what the host has not done by then.
        """
        ...

    def finish(self, cut: int) -> None:
        """After that was asked for; raises what went wrong."""
        ...


class Segments(Protocol):
    """A pass over tensors that stay where they are."""

    def run(self, host: Host | None = None) -> torch.Tensor:
        """Run all of it; without a host if there is no cut. The next run overwrites the result."""
        ...


class _Eager:
    """Without a GPU: the pass itself, each time."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def run(self, host: Host | None = None) -> torch.Tensor:
        return self._forward(_AtOnce(host))


class _AtOnce:
    """Cuts of a pass that is not captured: the host is done before what follows is computed."""

    def __init__(self, host: Host | None) -> None:
        self._host = host
        self._cuts = 0

    def handed(self) -> None: ...

    def __call__(self) -> None:
        assert self._host is not None  # noqa: S101
        cut, self._cuts = self._cuts, self._cuts + 1
        self._host.prepare(cut)
        self._host.begin(cut)
        self._host.finish(cut)


class _NoCut:
    def handed(self) -> None: ...

    def __call__(self) -> None: ...


class _Captured:
    """Graphs of one pool of memory: what one leaves for a later one stays where it is."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # Its own: other passes are run between two cuts of this one.
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Recorded by every graph with a cut, as one of its nodes.
        self._handed = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), nothing_freed():
            forward(_NoCut())  # libraries choose their kernels and take their memory
            stream.synchronize()
            try:
                self._begin()
                self._output = forward(self)
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

    def handed(self) -> None:
        self._handed.record()

    def __call__(self) -> None:
        self._graphs[-1].capture_end()
        self._begin()

    def run(self, host: Host | None = None) -> torch.Tensor:
        first, *others = self._graphs
        first.replay()
        for cut, graph in enumerate(others):
            assert host is not None  # noqa: S101
            host.prepare(cut)
            self._handed.synchronize()
            host.begin(cut)
            try:
                graph.replay()
            finally:
                host.finish(cut)
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
