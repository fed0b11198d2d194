"""The seam of the arithmetic: what answers "these rows through these experts", and who is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from remoe.activation import SILU, Activation
from remoe.expert_call import ExpertCall
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId

__all__ = ["ExpertKernel", "KernelChoice", "KernelUnavailableError", "RoutedRows", "open_kernel"]

KernelChoice = Literal["auto", "native", "numpy"]
ReadExpert = Callable[[ExpertId], ExpertTensors]

_log = logging.getLogger(__name__)
# About 20 us: from one half of an expert to the other, not from call to call.
_SPINS = 500


class KernelUnavailableError(ValueError):
    """The native library is not there, or not for this machine; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Rows and where they go; the caller has checked that all of it fits together.

    `hidden` is [rows, hidden_size] in a stored type (uint16 is bfloat16). Entries `offsets[i]` to
    `offsets[i + 1]` of `row_index` (int32) and `gate` (float32) belong to the i-th expert.
    """

    hidden: NDArray[np.generic]
    offsets: Sequence[int]
    row_index: NDArray[np.int32]
    gate: NDArray[np.float32]


class ExpertKernel(Protocol):
    """Experts, read when first called, and the arithmetic on them."""

    @property
    def description(self) -> str:
        """For people: which implementation, on what."""
        ...

    @property
    def loaded(self) -> int:
        """Experts that have been called."""
        ...

    def weighted_sum(
        self,
        experts: Sequence[ExpertId],
        rows: RoutedRows,
        total: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Each row's gate-weighted sum over its experts, float32 [rows, hidden_size].

        It is added to `total`, C-contiguous, if one is given.
        """
        ...

    def answer(self, call: ExpertCall) -> bytes:
        """What a call asks for, float32 [rows, hidden_size]; it was checked."""
        ...

    def forget(self, expert: ExpertId) -> None:
        """Keep nothing of an expert; it is read again if it is called again."""
        ...


def open_kernel(
    read: ReadExpert,
    choice: KernelChoice = "auto",
    *,
    activation: Activation = SILU,
    threads: int = 1,
    library: Path | None = None,
) -> ExpertKernel:
    """The native kernel if it was built and this machine runs it, or else numpy's.

    With `choice` "native" its absence raises KernelUnavailableError instead.
    """
    from remoe.kernel.native_kernel import NativeKernel
    from remoe.kernel.native_library import NativePool
    from remoe.kernel.numpy_kernel import NumpyKernel

    kernel: ExpertKernel
    if choice == "numpy":
        kernel = NumpyKernel(read, activation=activation)
    else:
        try:
            pool = NativePool(threads=threads, spins=_SPINS, library=library)
            kernel = NativeKernel(read, pool, activation=activation)
        except KernelUnavailableError as error:
            if choice == "native":
                raise
            kernel = NumpyKernel(read, activation=activation)
            _log.warning(
                "native_kernel_unavailable",
                extra={"error": str(error), "consequence": "numpy computes, several times slower"},
            )
    _log.info("expert_kernel", extra={"kernel": kernel.description, "choice": choice})
    return kernel
