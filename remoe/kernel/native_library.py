"""The compiled library (native/kernel.c): opening it, and a pool of its threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native import LIBRARY
from remoe.kernel.structures import Attention, Decoding, Norm, Projections, Routed, Router

__all__ = [
    "NativePool",
    "native_problem",
    "native_variants",
    "open_library",
]

# As in native/kernel.h.
_ABI = 11
_CALLS = (
    "forward",
    "route",
    "project",
    "normalize",
    "attend",
    "choose",
    "decode",
    "decode_here",
)


class NativePool:
    """A variant of the arithmetic, `threads` to run it on, and their buffers. Safe from any thread.

    A thread without work looks for more about `spins` times (tens of nanoseconds each) before it
    sleeps. Calls from several threads wait for each other.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        spins: int = 0,
        variant: str | None = None,
        library: Path | None = None,
    ) -> None:
        self._library = open_library(library or LIBRARY)
        self._spins = spins
        self.spared = threads // 2
        """Threads that rest where others compute on this machine's processors at the same time."""
        self._aside: int | None = None
        self.ended: NDArray[np.int32] | None = None
        """How many calls beside have ended, in memory that others watch; see `tell`."""
        self.begun = 0
        """How many have been begun, counted with `ended`."""
        self._handle = self._library.remoe_open(threads, spins, variant and variant.encode())
        if not self._handle:
            raise KernelUnavailableError(
                f"this machine cannot run variant {variant} on {threads} threads"
            )
        variant = variant or native_variants(library or LIBRARY)[0]
        self.description = f"native {variant}, {threads} thread{'s' * (threads > 1)}"

    def forward(self, call: ctypes.Structure) -> None:
        """Compute experts for rows gathered by expert: a `struct call` of native/kernel.h."""
        self._checked(self._library.remoe_forward(self._handle, ctypes.byref(call)))

    def route(self, routed: Routed) -> None:
        """Compute a layer's experts for rows as its router chose."""
        self._checked(self._library.remoe_route(self._handle, ctypes.byref(routed)))

    def project(self, projections: Projections) -> None:
        """Compute projections of the same rows into their outputs."""
        self._checked(self._library.remoe_project(self._handle, ctypes.byref(projections)))

    def normalize(self, norm: Norm) -> None:
        """Divide rows by their root mean square."""
        self._checked(self._library.remoe_normalize(self._handle, ctypes.byref(norm)))

    def attend(self, attention: Attention) -> None:
        """Put new keys and values into a paged cache, and attend to it."""
        self._checked(self._library.remoe_attend(self._handle, ctypes.byref(attention)))

    def choose(self, router: Router) -> None:
        """Choose each row's experts by its logits."""
        self._checked(self._library.remoe_choose(self._handle, ctypes.byref(router)))

    def decode(self, step: Decoding) -> None:
        """Compute a decoder's layers until one has chosen an expert that is not in its table."""
        self._checked(self._library.remoe_decode(self._handle, ctypes.byref(step)))

    def decode_here(self, step: Decoding) -> None:
        """At the layer where `decode` stopped, add what the experts in its table give."""
        self._checked(self._library.remoe_decode_here(self._handle, ctypes.byref(step)))

    def start(self, call: ctypes.Structure) -> Callable[[], None]:
        """Begin a `struct call` on a thread beside; what is returned waits for its end.

        One at a time, and to be waited for; the call and all it names stay alive till then.
        """
        self._library.remoe_aside_start(self._beside(), ctypes.byref(call))
        self.begun += 1
        return self.wait

    def start_route(self, routed: Routed) -> None:
        """Begin `route` on the same thread; `wait` for it before anything else is begun."""
        self._library.remoe_aside_route(self._beside(), ctypes.byref(routed))
        self.begun += 1

    def tell(self, ended: NDArray[np.int32]) -> None:
        """Count in `ended` [1], modulo 2^32, the calls beside as they end, also those that fail.

        For who cannot call `wait`, as a GPU. Between two calls.
        """
        self._library.remoe_aside_tell(self._beside(), ended.ctypes.data)
        self.ended, self.begun = ended, 0

    @property
    def busy(self) -> bool:
        """Whether what was begun on the thread beside is under way."""
        return self._aside is not None and bool(self._library.remoe_aside_busy(self._aside))

    def wait(self) -> None:
        """Wait for what was begun on the thread beside."""
        self._checked(self._library.remoe_aside_wait(self._aside))

    def _beside(self) -> int:
        if self._aside is None:
            self._aside = self._library.remoe_aside_open(self._handle, self._spins)
            if not self._aside:
                raise MemoryError("no room for another thread of the kernel")
        return self._aside

    def close(self) -> None:
        """End its threads; it must not be used again."""
        if self._aside:
            self._library.remoe_aside_close(self._aside)
            self._aside = None
        if self._handle:
            self._library.remoe_close(self._handle)
            self._handle = None

    @staticmethod
    def _checked(status: int) -> None:
        if status != 0:
            raise MemoryError("no memory for the kernel's buffers")


def native_variants(library: Path = LIBRARY) -> list[str]:
    """What this machine can run, the fastest first."""
    opened, names = open_library(library), list[str]()
    while name := opened.remoe_variant(len(names)):
        names.append(name.decode())
    return names


def native_problem(library: Path | None = None) -> str | None:
    """Why the library cannot serve here, and what mends that; None if it can."""
    try:
        open_library(library or LIBRARY)
    except KernelUnavailableError as error:
        return str(error)
    return None


@cache
def open_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library, its functions declared; raises KernelUnavailableError if it cannot serve."""
    again = "run `python -m remoe.kernel.native.build`, which needs a C compiler"
    try:
        library = ctypes.CDLL(str(path))
        library.remoe_kernel_abi.restype = ctypes.c_int64
        found = library.remoe_kernel_abi()
    except (OSError, AttributeError) as error:
        raise KernelUnavailableError(f"no native kernel ({error}): {again}") from error
    if found != _ABI:
        raise KernelUnavailableError(
            f"{path} is stale (interface {found}; these sources have {_ABI}): {again}"
        )
    library.remoe_open.restype = ctypes.c_void_p
    library.remoe_open.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p]
    for name in _CALLS:
        getattr(library, f"remoe_{name}").argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.remoe_aside_open.restype = ctypes.c_void_p
    library.remoe_aside_open.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("start", "route"):
        begin = getattr(library, f"remoe_aside_{name}")
        begin.argtypes, begin.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    library.remoe_aside_tell.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.remoe_aside_tell.restype = None
    library.remoe_aside_busy.argtypes = [ctypes.c_void_p]
    library.remoe_aside_wait.argtypes = [ctypes.c_void_p]
    library.remoe_aside_close.argtypes = [ctypes.c_void_p]
    library.remoe_aside_close.restype = None
    library.remoe_polling_open.restype = ctypes.c_void_p
    library.remoe_polling_open.argtypes = [ctypes.c_int64]
    library.remoe_polling_for.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.remoe_polling_for.restype = None
    library.remoe_polling_wait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    library.remoe_polling_close.argtypes = [ctypes.c_void_p]
    library.remoe_polling_close.restype = None
    library.remoe_close.argtypes = [ctypes.c_void_p]
    library.remoe_close.restype = None
    library.remoe_variant.argtypes = [ctypes.c_int64]
    library.remoe_variant.restype = ctypes.c_char_p
    return library
