"""CUDA's run-time library, called as it is: what a decoding step does thousands of times a second.

Streams, events and tensors of torch's around the same calls are what the host would wait for, the
more so while the memory is busy with weights.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

__all__ = ["CopyLane"]

_ANY_DIRECTION = 4  # cudaMemcpyDefault: addresses say where memory is


@cache
def _runtime() -> ctypes.CDLL:
    """The library that torch has loaded; OSError if it cannot be found."""
    major = (torch.version.cuda or "").split(".")[0]
    library = ctypes.CDLL(f"libcudart.so.{major}")
    pointer = ctypes.c_void_p
    library.cudaMemcpyAsync.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer]
    library.cudaEventRecord.argtypes = [pointer, pointer]
    library.cudaEventSynchronize.argtypes = [pointer]
    library.cudaEventQuery.argtypes = [pointer]
    library.cudaStreamWaitEvent.argtypes = [pointer, pointer, ctypes.c_uint]
    return library


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"CUDA error {status} in a decoding step's copies")


class CopyLane:
    """A stream of copies into some buffers that other streams compute on, ordered by events.

    The host waits in `free` alone.
    """

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._runtime = _runtime()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies: int = self._stream.cuda_stream
        self._events = [torch.cuda.Event() for _ in range(2 * buffers)]  # type: ignore[no-untyped-call]
        for event in self._events:
            event.record(self._stream)  # which makes it
        handles: list[int] = [event.cuda_event for event in self._events]
        self._arrived, self._used = handles[:buffers], handles[buffers:]
        torch.cuda.synchronize(device)

    def free(self, buffer: int) -> None:
        """Wait until the computing that used a buffer last is over."""
        _check(self._runtime.cudaEventSynchronize(self._used[buffer]))

    def done(self, buffer: int) -> bool:
        """Whether that is over."""
        return bool(self._runtime.cudaEventQuery(self._used[buffer]) == 0)

    def copy(self, buffer: int, to: int, source: int, size_bytes: int) -> None:
        """Begin to copy to a free buffer, from any memory that the GPU reaches."""
        runtime, stream = self._runtime, self._copies
        _check(runtime.cudaMemcpyAsync(to, source, size_bytes, _ANY_DIRECTION, stream))
        _check(runtime.cudaEventRecord(self._arrived[buffer], stream))

    def arrived(self, buffer: int, stream: int) -> None:
        """Let what is asked for on a stream from now on wait for the copy to a buffer."""
        _check(self._runtime.cudaStreamWaitEvent(stream, self._arrived[buffer], 0))

    def used(self, buffer: int, stream: int) -> None:
        """Note that what was asked for on a stream until now is the last that uses a buffer."""
        _check(self._runtime.cudaEventRecord(self._used[buffer], stream))
