"""Memory of this host that a GPU reads without the host's help: pinned, in large pages."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from typing import Any

import structlog
import torch

__all__ = ["host_empty", "pin", "seen_by_gpu", "unpin"]

_log = structlog.get_logger()


class _Pages(mmap.mmap):
    """Anonymous memory, which the GPU's driver is told to forget before it goes."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None and not sys.is_finalizing():
            # A copy may be under way for a batch that was computed while its expert was detached.
            torch.cuda.synchronize()
            _cuda().cudaHostUnregister(self.address)


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """A tensor of memory of its own, of no more than its size; `pinned` needs CUDA.

    torch's own pinned memory comes in powers of two: a third more for an expert of OLMoE.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    # Shared memory, which is mmap's default, gets no large pages: each weight row would be a page.
    pages = _Pages(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    if pinned and pin(tensor):
        pages.address = tensor.data_ptr()
    return tensor


def pin(tensor: torch.Tensor) -> bool:
    """Pin a tensor's memory where it lies; False, and a warning, if the driver refuses.

    Copies from it are then slower and wait for the host, but right.
    """
    size_bytes = tensor.numel() * tensor.element_size()
    status = _cuda().cudaHostRegister(tensor.data_ptr(), size_bytes, 0)
    if int(status) != 0:
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # the next launch would report this error as its own
        _log.warning("memory_not_pinned", bytes=size_bytes, cuda_error=int(status))
    return int(status) == 0


def unpin(tensor: torch.Tensor) -> None:
    """Undo `pin` for the memory that begins where this tensor's does; no copy may be under way."""
    _cuda().cudaHostUnregister(tensor.data_ptr())


def seen_by_gpu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned memory as a tensor of the GPU's, whose kernels read and write it where it lies.

    For few numbers: each access passes the link. It must not outlive `tensor`.
    """
    if device.type != "cuda":
        return tensor
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return torch.as_tensor(_OnHost(bits), device=device).view(tensor.dtype)


class _OnHost:
    """What torch asks of another library's arrays."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _cuda() -> Any:
    """CUDA's run-time library, as far as torch shows it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
