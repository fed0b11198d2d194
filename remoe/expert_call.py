"""The binary protocol between the main-model function and an expert function.

One call per function and layer, with each token's row sent once: `POST /v1/experts`,
`application/vnd.remoe.v1+msgpack`, an `ExpertCall`; the answer is an `ExpertReply`, or an
`ExpertFailure` with a 4xx or 5xx status.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "CONTENT_TYPE",
    "ITEM_BYTES",
    "MAX_BODY_BYTES",
    "PATH",
    "TOKEN_VARIABLE",
    "ExpertCall",
    "ExpertFailure",
    "ExpertReply",
    "FailureCode",
    "RowDtype",
    "bearer",
]

CONTENT_TYPE = "application/vnd.remoe.v1+msgpack"
PATH = "/v1/experts"
# The papers' payload limit (AWS Lambda's), in each direction; both sides' settings default to it.
MAX_BODY_BYTES = 6_000_000

RowDtype = Literal["float32", "bfloat16", "float16"]
ITEM_BYTES: dict[RowDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
FailureCode = Literal[
    "wrong_model",
    "wrong_shape",
    "unknown_expert",
    "body_too_large",
    "malformed",
    "unauthorized",
    "internal",
]
# Where callers and functions find the token they share; without one, calls need none.
TOKEN_VARIABLE = "REMOE_EXPERT_TOKEN"  # noqa: S105  # its name


def bearer(token: str) -> str:
    """The Authorization header of a call."""
    return f"Bearer {token}"


class ExpertCall(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Rows for some experts of one layer.

    `hidden` is `dtype` [rows, hidden_size], little-endian, each token once. For the i-th of
    `experts`, entries `offsets[i]` to `offsets[i + 1]` of `row_index` (int32) and `gate` (float32)
    say which rows go to it and with which gate weight. `beside` asks to leave half of this machine's
    processors to the caller, which computes on them meanwhile; `near` says that the caller is on
    this machine at all.
    """

    model_digest: str
    layer: int
    dtype: RowDtype
    rows: int
    hidden: bytes
    experts: list[int]
    offsets: list[int]
    row_index: bytes
    gate: bytes
    beside: bool = False
    near: bool = False


class ExpertReply(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """`partial` is float32 [rows, hidden_size]: the gate-weighted sum over the called experts.

    `busy_s` is the function's own computing time, which is what it bills. `ready_for_s` is how
    long the replica had been ready when it answered: a caller that waited longer than that has
    waited for its cold start, whatever the clocks say.
    """

    partial: bytes
    busy_s: float
    ready_for_s: float


class ExpertFailure(msgspec.Struct, frozen=True, kw_only=True):
    code: FailureCode
    message: str
