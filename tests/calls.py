"""Building expert calls by hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.expert_call import ExpertCall


def expert_call(
    digest: str,
    hidden: NDArray[np.float32],
    routes: dict[int, list[tuple[int, float]]],
    *,
    layer: int = 0,
) -> ExpertCall:
    """`routes` gives for each expert its (row, gate weight) pairs."""
    pairs = [pair for of_expert in routes.values() for pair in of_expert]
    return ExpertCall(
        model_digest=digest,
        layer=layer,
        dtype="float32",
        rows=len(hidden),
        hidden=hidden.astype("<f4").tobytes(),
        experts=list(routes),
        offsets=[0, *np.cumsum([len(of_expert) for of_expert in routes.values()]).tolist()],
        row_index=np.array([row for row, _ in pairs], "<i4").tobytes(),
        gate=np.array([gate for _, gate in pairs], "<f4").tobytes(),
    )


def sums(partial: bytes, rows: int) -> NDArray[np.float32]:
    """A reply's partial sums, [rows, hidden]."""
    return np.frombuffer(partial, "<f4").reshape(rows, -1)
