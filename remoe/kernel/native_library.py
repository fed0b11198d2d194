"""The compiled library (native/kernel.c): opening it, its structures, and a pool of its threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native import LIBRARY

__all__ = [
    "ANSWER",
    "ANSWERED",
    "BROKEN",
    "DTYPES",
    "NOT_POSTED",
    "POSTED",
    "Attention",
    "Decoding",
    "Elsewhere",
    "Layer",
    "Line",
    "Matrix",
    "NativePool",
    "Norm",
    "Projection",
    "Projections",
    "Request",
    "Routed",
    "Router",
    "native_problem",
    "native_variants",
    "open_library",
]

# As in native/kernel.h.
_ABI = 11
DTYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}
"""The library's number of a stored type; uint16 is bfloat16."""
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


class Matrix(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class Projection(ctypes.Structure):
    _fields_ = (
        ("weights", Matrix),
        ("bias", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("output", ctypes.c_void_p),
    )


class Projections(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("input", Matrix),
        ("projection", ctypes.c_void_p),
    )


class Routed(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("experts", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("input", Matrix),
        ("output", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("input", Matrix),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("output", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("read_ends", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("normalized", ctypes.c_int64),
        ("gate_dtype", ctypes.c_int64),
        ("logits", Matrix),
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
    )


class Request(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("layer_at", ctypes.c_int64),
        ("hidden_at", ctypes.c_int64),
        ("experts_at", ctypes.c_int64),
        ("gate_at", ctypes.c_int64),
        ("beside_at", ctypes.c_int64),
    )


class Line(ctypes.Structure):
    _fields_ = (
        ("descriptor", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("request", ctypes.c_void_p),
        ("reply_head", ctypes.c_char_p),  # given bytes, it keeps them alive
        ("reply_head_size", ctypes.c_int64),
        ("reply", ctypes.c_void_p),
        ("reply_room", ctypes.c_int64),
        ("patience_ns", ctypes.c_int64),
        ("polling", ctypes.c_void_p),
        ("missed", ctypes.c_int64),
    )


ANSWER = np.dtype(
    [
        ("state", np.int64),
        ("routes", np.int64),
        ("received", np.int64),
        ("waited_s", np.float64),
        ("busy_s", np.float64),
        ("ready_for_s", np.float64),
    ]
)
"""What became of a layer's call; its states are the next four."""
NOT_POSTED, BROKEN, POSTED, ANSWERED = range(4)


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("experts_norm", Norm),
        ("inputs", Projections),
        ("output", Projections),
        ("logits", Projections),
        ("attention", Attention),
        ("router", Router),
        ("experts", Routed),
        ("line", ctypes.c_void_p),
        ("number", ctypes.c_int64),
    )


class Elsewhere(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("routes", ctypes.c_int64),
        ("token", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("expert", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("gate_weight", ctypes.c_void_p),
    )


class Decoding(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("watched", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("stopped", ctypes.c_int64),
        ("each", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("partial", ctypes.c_char_p),  # given bytes, it keeps them alive
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("requests", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("read_ends", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("elsewhere", Elsewhere),
        ("answers", ctypes.c_void_p),
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
