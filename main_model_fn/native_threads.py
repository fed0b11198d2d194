"""The native kernel of a main function: whether it serves, and on how many threads."""

from __future__ import annotations

import os

import structlog
import torch

from main_model_fn.config import MainSettings
from main_model_fn.machine import SPINS_BESIDE_GPU
from remoe.errors import SettingsError
from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native_library import NativePool

__all__ = ["open_pool"]

_log = structlog.get_logger()
# About 50 us: the kernel is called every 100 to 300 us while a token is decoded, and waking a
# thread costs what a small projection does. A thread that waits for a remote expert soon sleeps.
_SPINS = 2000


def open_pool(settings: MainSettings, device: torch.device) -> NativePool | None:
    """Threads for the settings' kernel, or None where torch computes.

    Beside a GPU one processor less: it gives the GPU its work. Raises SettingsError if the native
    kernel is asked for and cannot be had.
    """
    if settings.kernel == "torch":
        return None
    beside = 0 if device.type == "cpu" else 1
    threads = settings.threads or max(1, _available_threads() - beside)
    try:
        pool = NativePool(threads=threads, spins=SPINS_BESIDE_GPU if beside else _SPINS)
    except KernelUnavailableError as error:
        if settings.kernel == "native":
            raise SettingsError(f"REMOE_MAIN_KERNEL is native: {error}") from error
        _log.warning(
            "native_kernel_unavailable",
            error=str(error),
            consequence="torch computes, several times slower",
        )
        return None
    # What is left to torch is small: its own threads would only keep the kernel's from theirs
    # (two processors, eight streams: 80 tokens/s instead of 71).
    torch.set_num_threads(1)
    return pool


def _available_threads() -> int:
    """What the runtime allows (OMP_NUM_THREADS is how it says so), or this process's processors."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdecimal() else len(os.sched_getaffinity(0))
