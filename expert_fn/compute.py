"""Answer expert calls: check them, run the experts they name, sum what comes out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from remoe.checkpoint import Checkpoint
from remoe.expert_call import ExpertCall, FailureCode
from remoe.experts import ExpertId
from remoe.kernel.interface import ExpertKernel, RoutedRows, open_kernel

__all__ = ["ExpertComputer", "RefusedCallError"]

_STORAGE = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}


class RefusedCallError(Exception):
    """A call that cannot be answered; `code` goes back to the caller."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ExpertComputer:
    """The experts of a range of layers, on one kernel."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        first_layer: int,
        last_layer: int,
        kernel: ExpertKernel | None = None,
    ) -> None:
        if last_layer >= checkpoint.layers:
            raise ValueError(
                f"layers {first_layer} to {last_layer} asked for; the model has {checkpoint.layers}"
            )
        self._checkpoint = checkpoint
        self._layers = range(first_layer, last_layer + 1)
        self._kernel = kernel or open_kernel(checkpoint.expert, activation=checkpoint.activation)

    @property
    def loaded(self) -> int:
        """Experts whose weights have been read."""
        return self._kernel.loaded

    def compute(self, call: ExpertCall) -> NDArray[np.float32]:
        """The gate-weighted sum over the called experts, float32 [rows, hidden]."""
        self._check(call)
        hidden = np.frombuffer(call.hidden, _STORAGE[call.dtype])
        rows = RoutedRows(
            hidden=hidden.reshape(call.rows, self._checkpoint.hidden_size),
            offsets=call.offsets,
            row_index=np.frombuffer(call.row_index, "<i4"),
            gate=np.frombuffer(call.gate, "<f4"),
        )
        return self._kernel.weighted_sum(
            [ExpertId(call.layer, index) for index in call.experts], rows
        )

    def _check(self, call: ExpertCall) -> None:
        for holds, code, message in self._conditions(call):
            if not holds():
                raise RefusedCallError(code, message)

    def _conditions(self, call: ExpertCall) -> list[tuple[Callable[[], bool], FailureCode, str]]:
        """Each is checked only once those before it hold."""
        hidden_size, experts = self._checkpoint.hidden_size, self._checkpoint.experts
        item_bytes = np.dtype(_STORAGE[call.dtype]).itemsize
        routes = len(call.row_index) // 4
        return [
            (
                lambda: call.model_digest == self._checkpoint.digest,
                "wrong_model",
                f"this function holds {self._checkpoint.digest}, not {call.model_digest}",
            ),
            (
                lambda: call.layer in self._layers,
                "unknown_expert",
                f"layer {call.layer} is not among {self._layers[0]} to {self._layers[-1]}",
            ),
            (
                lambda: call.layer in self._checkpoint.moe_layers,
                "unknown_expert",
                f"layer {call.layer} is dense: it has no experts",
            ),
            (
                lambda: all(0 <= expert < experts for expert in call.experts),
                "unknown_expert",
                f"experts {call.experts} are not all within 0 to {experts - 1}",
            ),
            (
                lambda: len(call.hidden) == call.rows * hidden_size * item_bytes,
                "wrong_shape",
                f"{len(call.hidden)} bytes are not {call.rows} rows of {hidden_size} {call.dtype}",
            ),
            (
                lambda: (
                    len(call.gate) == len(call.row_index) == 4 * routes
                    and len(call.offsets) == len(call.experts) + 1
                    and call.offsets[0] == 0
                    and call.offsets[-1] == routes
                    and call.offsets == sorted(call.offsets)
                ),
                "wrong_shape",
                "offsets, row indices and gates do not fit together",
            ),
            (
                lambda: self._rows_are_good(call),
                "wrong_shape",
                f"row indices must lie in 0 to {call.rows - 1}, each once for one expert",
            ),
        ]

    def _rows_are_good(self, call: ExpertCall) -> bool:
        row_index = np.frombuffer(call.row_index, "<i4")
        if row_index.size and not 0 <= row_index.min() <= row_index.max() < call.rows:
            return False
        pairs = zip(call.offsets, call.offsets[1:], strict=False)
        return all(len(np.unique(row_index[a:b])) == b - a for a, b in pairs)
