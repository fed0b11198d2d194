"""Weights on their way to the GPU, beside its computing: two buffers, filled and used by turns.

On another device the same steps are taken one after another, so that all of it runs without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["ExpertWeights", "Staging"]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert, laid out as its module says.

    `gate_up` is [2 x intermediate, hidden] and `down` [hidden, intermediate], or both transposed.
    An expert in slices along its intermediate dimension has one more dimension in front: it is the
    sum of those smaller ones. With a `block` all of it lies there, slice by slice.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    block: torch.Tensor | None = None

    @classmethod
    def within(
        cls, block: torch.Tensor, inner: int, hidden: int, *, biased: bool = False, slices: int = 1
    ) -> ExpertWeights:
        """An expert that fills a block of memory of `size` numbers."""
        inner //= slices
        shapes = [(2 * inner, hidden), (hidden, inner), *([(2 * inner,), (hidden,)] * biased)]
        each, parts, first = block.view(slices, -1), list[torch.Tensor](), 0
        for shape in shapes:
            count = math.prod(shape)
            part = each[:, first : first + count].view(slices, *shape)
            parts.append(part if slices > 1 else part[0])
            first += count
        return cls(*parts, block=block)  # type: ignore[misc]  # two to four of them

    @staticmethod
    def size(inner: int, hidden: int, *, biased: bool = False, slices: int = 1) -> int:
        """Numbers that such an expert has."""
        return 3 * inner * hidden + biased * (2 * inner + slices * hidden)

    @property
    def slices(self) -> int:
        return len(self.down) if self.down.dim() == 3 else 1  # dimensions

    @property
    def shape(self) -> tuple[int, int]:
        """Intermediate and hidden size, of all slices together."""
        return self.down.shape[-1] * self.slices, self.down.shape[-2]

    def cut(self) -> list[ExpertWeights]:
        """Its slices, each an expert in the same memory."""
        if self.block is None or self.slices == 1:
            return [self]
        inner, hidden = self.down.shape[-1], self.down.shape[-2]
        biased = self.down_bias is not None
        return [
            ExpertWeights.within(part, inner, hidden, biased=biased)
            for part in self.block.view(self.slices, -1)
        ]

    def all(self) -> list[torch.Tensor]:
        """Its matrices, and its biases if it has them."""
        biases = (self.gate_up_bias, self.down_bias)
        return [self.gate_up, self.down, *(bias for bias in biases if bias is not None)]

    def pieces(self) -> list[torch.Tensor]:
        """What has to be copied: a block, or all of them."""
        return self.all() if self.block is None else [self.block]

    def empty_like(self, device: torch.device) -> ExpertWeights:
        """Room for it on a device."""
        if self.block is not None:
            block, biased = torch.empty_like(self.block, device=device), self.down_bias is not None
            return ExpertWeights.within(block, *self.shape, biased=biased, slices=self.slices)
        return ExpertWeights(
            *(
                None if tensor is None else torch.empty_like(tensor, device=device)
                for tensor in (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
            )  # type: ignore[arg-type]  # the first two are there
        )

    def to(self, device: torch.device) -> ExpertWeights:
        """A copy on a device."""
        copy = self.empty_like(device)
        for to, tensor in zip(copy.pieces(), self.pieces(), strict=True):
            to.copy_(tensor)
        return copy


_Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class _Queue(Protocol):
    """Copies in the order in which they are asked for."""

    def copy(self, pairs: _Pairs, buffer: int) -> None:
        """Queue copies to the first of each pair, behind the last computing that used a buffer."""
        ...

    def arrived(self, buffer: int) -> None:
        """Let computing that is asked for from now on wait for the copy to the buffer."""
        ...

    def used(self, buffer: int) -> None:
        """Note that the computing asked for until now is the last that uses the buffer."""
        ...


class _AtOnce:
    """Each copy is done when it is asked for."""

    def copy(self, pairs: _Pairs, buffer: int) -> None:
        for target, tensor in pairs:
            target.copy_(tensor)

    def arrived(self, buffer: int) -> None: ...

    def used(self, buffer: int) -> None: ...


class _CudaQueue:
    """A CUDA stream beside the current one; events order the two, and the host waits for neither."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # An event that was never recorded is waited for by nobody.
        event: Callable[[], torch.cuda.Event] = torch.cuda.Event
        self._arrived = [event() for _ in range(buffers)]
        self._used = [event() for _ in range(buffers)]

    def copy(self, pairs: _Pairs, buffer: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[buffer])
            for target, tensor in pairs:
                target.copy_(tensor, non_blocking=True)
            self._arrived[buffer].record(self._stream)

    def arrived(self, buffer: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[buffer])

    def used(self, buffer: int) -> None:
        self._used[buffer].record(torch.cuda.current_stream(self._device))


def _queue(device: torch.device, buffers: int) -> _Queue:
    """A queue of copies to so many buffers on a device."""
    if device.type != "cuda":
        return _AtOnce()
    # The buffers' memory may have been other tensors', which a stream still uses.
    torch.cuda.synchronize(device)
    return _CudaQueue(device, buffers)


class Staging:
    """Room on a device for experts that are computed there once. For one thread."""

    def __init__(self, like: ExpertWeights, device: torch.device, *, buffers: int = 2) -> None:
        self._buffers = [like.empty_like(device) for _ in range(buffers)]
        self._queue = _queue(device, buffers)
        self._sent = self._taken = 0

    @property
    def room(self) -> int:
        """How many more can be sent before one is taken."""
        return len(self._buffers) - (self._sent - self._taken)

    def send(self, weights: ExpertWeights) -> None:
        """Begin to copy an expert from pinned memory of the host."""
        if not self.room:
            raise ValueError("no buffer is free: take an expert first")
        buffer = self._sent % len(self._buffers)
        to = self._buffers[buffer]
        self._queue.copy(zip(to.pieces(), weights.pieces(), strict=True), buffer)
        self._sent += 1

    @contextmanager
    def take(self) -> Iterator[ExpertWeights]:
        """The expert that was sent first, for the computing that is asked for within."""
        buffer = self._taken % len(self._buffers)
        self._queue.arrived(buffer)
        yield self._buffers[buffer]
        self._queue.used(buffer)
        self._taken += 1
