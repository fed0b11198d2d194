"""What MoEless' policies report: balance, replicas and how good predictions are, live."""

from __future__ import annotations

import msgspec

__all__ = ["BalanceReport"]


class BalanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """Lists are by decoder layer. The CV is of expert loads with one replica each, and with the
    scaler's; `overlap` is the share of routes foretold in flight, null where nothing was.

    `replicas` are of each expert function, 0 where it may sleep; `attached` experts are in the main
    function beyond the plan.
    """

    policy: str
    layer_cv: list[float]
    scaled_cv: list[float]
    overlap: list[float | None]
    replicas: dict[str, int]
    attached: int
