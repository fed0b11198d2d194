"""How often each expert was expected to be used, and was: counters that only grow."""

from __future__ import annotations

import msgspec

__all__ = ["ActivationTotals"]


class ActivationTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Routes to each expert, [layers][experts], as predicted and as they came, of `requests`.

    Both are of the same requests and have the same sum in each layer: predicted shares are
    multiplied by the routes that the request really had.
    """

    requests: int
    predicted: list[list[float]]
    actual: list[list[float]]

    def since(self, before: ActivationTotals) -> ActivationTotals:
        """What came after `before`, an earlier reading of the same counters."""
        return ActivationTotals(
            requests=self.requests - before.requests,
            predicted=_minus(self.predicted, before.predicted),
            actual=_minus(self.actual, before.actual),
        )


def _minus(these: list[list[float]], those: list[list[float]]) -> list[list[float]]:
    return [
        [a - b for a, b in zip(this, that, strict=True)]
        for this, that in zip(these, those, strict=True)
    ]
