"""A model's files out of the page cache, and how much of them is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

__all__ = ["cached_share", "drop", "warm"]

_libc = ctypes.CDLL(None, use_errno=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def drop(folder: Path) -> None:
    """Ask the kernel to let go of the files; pages that a running process has mapped stay."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read the files once."""
    for path in _files(folder):
        with path.open("rb") as file:
            while file.read(1 << 22):
                pass


def cached_share(folder: Path) -> float:
    """The share of the files' bytes that is in the page cache (mincore)."""
    cached = total = 0
    for path in _files(folder):
        size = path.stat().st_size
        if size == 0:
            continue
        with (
            path.open("rb") as file,
            # Private and writable, because only such a buffer tells ctypes its address.
            mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped,
        ):
            pages = -(-size // mmap.PAGESIZE)
            resident = np.zeros(pages, np.uint8)
            view = (ctypes.c_char * size).from_buffer(mapped)
            failed = _libc.mincore(
                ctypes.c_void_p(ctypes.addressof(view)),
                ctypes.c_size_t(size),
                ctypes.c_void_p(resident.ctypes.data),
            )
            del view
            if failed:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
            cached += int((resident & 1).sum())
            total += pages
    return cached / total if total else 0.0
