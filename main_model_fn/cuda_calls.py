"""CUDA's libraries, called as they are: what a decoding step does thousands of times a second.

Streams, events and tensors of torch's around the same calls are what the host would wait for, the
more so while the memory is busy with weights.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

__all__ = ["CopyLane", "wait_for_count"]

_ANY_DIRECTION = 4  # cudaMemcpyDefault: addresses say where memory is
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, of a signed difference


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


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    library.cuStreamWaitValue32_v2.argtypes = [pointer, ctypes.c_uint64, number, ctypes.c_uint]
    return library


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"CUDA error {status} in a decoding step")


def wait_for_count(stream: int, address: int, count: int) -> None:
    """Let what is asked for on a stream from now on wait until 4 bytes of pinned memory count so far.

    They may pass the largest number and begin again at 0.
    """
    _check(_driver().cuStreamWaitValue32_v2(stream, address, count & 0xFFFFFFFF, _AT_LEAST))


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
