"""Answer expert calls: check them, run the experts they name, sum what comes out."""

from __future__ import annotations

import numpy as np

from remoe.checkpoint import Checkpoint
from remoe.expert_call import ITEM_BYTES, ExpertCall, FailureCode
from remoe.kernel.interface import ExpertKernel, open_kernel

__all__ = ["ExpertComputer", "RefusedCallError"]


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
        self._digest = checkpoint.digest
        self._hidden_size, self._experts = checkpoint.hidden_size, checkpoint.experts
        self._layers = range(first_layer, last_layer + 1)
        self._moe_layers = frozenset(checkpoint.moe_layers)
        self._kernel = kernel or open_kernel(checkpoint.expert, activation=checkpoint.activation)

    @property
    def loaded(self) -> int:
        """Experts whose weights have been read."""
        return self._kernel.loaded

    def compute(self, call: ExpertCall) -> bytes:
        """The gate-weighted sum over the called experts, float32 [rows, hidden]."""
        self._check(call)
        return self._kernel.answer(call)

    def _check(self, call: ExpertCall) -> None:
        """Raise unless the call is for this model, for experts held here, and of one piece."""
        hidden_size, experts = self._hidden_size, self._experts
        if call.model_digest != self._digest:
            raise RefusedCallError(
                "wrong_model",
                f"this function holds {self._digest}, not {call.model_digest}",
            )
        if call.layer not in self._layers:
            raise RefusedCallError(
                "unknown_expert",
                f"layer {call.layer} is not among {self._layers[0]} to {self._layers[-1]}",
            )
        if call.layer not in self._moe_layers:
            raise RefusedCallError(
                "unknown_expert", f"layer {call.layer} is dense: it has no experts"
            )
        if call.experts and not 0 <= min(call.experts) <= max(call.experts) < experts:
            raise RefusedCallError(
                "unknown_expert",
                f"experts {call.experts} are not all within 0 to {experts - 1}",
            )
        if len(call.hidden) != call.rows * hidden_size * ITEM_BYTES[call.dtype]:
            raise RefusedCallError(
                "wrong_shape",
                f"{len(call.hidden)} bytes are not {call.rows} rows of {hidden_size} {call.dtype}",
            )
        routes = len(call.row_index) // 4
        if not (
            len(call.gate) == len(call.row_index) == 4 * routes
            and len(call.offsets) == len(call.experts) + 1
            and call.offsets[0] == 0
            and call.offsets[-1] == routes
            and call.offsets == sorted(call.offsets)
        ):
            raise RefusedCallError(
                "wrong_shape", "offsets, row indices and gates do not fit together"
            )
        if not _rows_are_good(call):
            raise RefusedCallError(
                "wrong_shape",
                f"row indices must lie in 0 to {call.rows - 1}, each once for one expert",
            )


def _rows_are_good(call: ExpertCall) -> bool:
    pairs = zip(call.offsets, call.offsets[1:], strict=False)
    if call.rows == 1:  # as while one stream decodes: without an array
        return not any(call.row_index) and all(b - a < 2 for a, b in pairs)
    row_index = np.frombuffer(call.row_index, "<i4")
    if row_index.size and not 0 <= row_index.min() <= row_index.max() < call.rows:
        return False
    return all(b - a < 2 or len(np.unique(row_index[a:b])) == b - a for a, b in pairs)
