"""An expert call's rows as a kernel takes them."""

from __future__ import annotations

import numpy as np

from remoe.expert_call import ExpertCall, RowDtype
from remoe.kernel.interface import RoutedRows

__all__ = ["routed_rows"]

_STORAGE: dict[RowDtype, str] = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}


def routed_rows(call: ExpertCall) -> RoutedRows:
    """Views of the call's bytes; the caller has checked that they fit together."""
    hidden = np.frombuffer(call.hidden, _STORAGE[call.dtype])
    return RoutedRows(
        hidden=hidden.reshape(call.rows, hidden.size // max(1, call.rows)),
        offsets=call.offsets,
        row_index=np.frombuffer(call.row_index, "<i4"),
        gate=np.frombuffer(call.gate, "<f4"),
    )
