"""Weights on their way to the GPU, beside its computing: two buffers, filled and used by turns.

On another device the same steps are taken one after another, so that all of it runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["ExpertWeights", "Staging"]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert, laid out as its module says.

    `gate_up` is [2 x intermediate, hidden] and `down` [hidden, intermediate], or both transposed.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def all(self) -> list[torch.Tensor]:
        """Its matrices, and its biases if it has them."""
        biases = (self.gate_up_bias, self.down_bias)
        return [self.gate_up, self.down, *(bias for bias in biases if bias is not None)]

    def empty_like(self, device: torch.device) -> ExpertWeights:
        """Room for it on a device."""
        return ExpertWeights(
            *(
                None if tensor is None else torch.empty_like(tensor, device=device)
                for tensor in (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
            )  # type: ignore[arg-type]  # the first two are there
        )

    def to(self, device: torch.device) -> ExpertWeights:
        """A copy on a device."""
        copy = self.empty_like(device)
        for to, tensor in zip(copy.all(), self.all(), strict=True):
            to.copy_(tensor)
        return copy


class _Queue(Protocol):
    """Copies in the order in which they are asked for."""

    def copy(self, to: ExpertWeights, weights: ExpertWeights, buffer: int) -> None:
        """Queue a copy, behind the last computing that used the buffer."""
        ...

    def arrived(self, buffer: int) -> None:
        """Let computing that is asked for from now on wait for the copy to the buffer."""
        ...

    def used(self, buffer: int) -> None:
        """Note that the computing asked for until now is the last that uses the buffer."""
        ...


class _AtOnce:
    """Each copy is done when it is asked for."""

    def copy(self, to: ExpertWeights, weights: ExpertWeights, buffer: int) -> None:
        for target, tensor in zip(to.all(), weights.all(), strict=True):
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

    def copy(self, to: ExpertWeights, weights: ExpertWeights, buffer: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[buffer])
            for target, tensor in zip(to.all(), weights.all(), strict=True):
                target.copy_(tensor, non_blocking=True)
            self._arrived[buffer].record(self._stream)

    def arrived(self, buffer: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[buffer])

    def used(self, buffer: int) -> None:
        self._used[buffer].record(torch.cuda.current_stream(self._device))


class Staging:
    """Room on a device for experts that are computed there once. For one thread."""

    def __init__(self, like: ExpertWeights, device: torch.device, *, buffers: int = 2) -> None:
        self._buffers = [like.empty_like(device) for _ in range(buffers)]
        self._queue: _Queue = _AtOnce()
        if device.type == "cuda":
            self._queue = _CudaQueue(device, buffers)
            # The memory may have been another tensor's, which a stream still uses.
            torch.cuda.synchronize(device)
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
        self._queue.copy(self._buffers[buffer], weights, buffer)
        self._sent += 1

    @contextmanager
    def take(self) -> Iterator[ExpertWeights]:
        """The expert that was sent first, for the computing that is asked for within."""
        buffer = self._taken % len(self._buffers)
        self._queue.arrived(buffer)
        yield self._buffers[buffer]
        self._queue.used(buffer)
        self._taken += 1
