"""What the model of times gets wrong, learned from requests, and when that calls for new plans.

See papers.md A.3.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

import msgspec
import numpy as np

from planner.moving_mean import MovingMean

__all__ = ["Calibration", "Drift"]

_KEPT_PLANS = 1024
_WINDOW = 64
_ENOUGH = 8
# A request that took ten times as long says more about its machine than about the model.
_LARGEST = math.log(10)


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Observed over predicted times: `*_factor` on average, `*_tail` P97.5 relative to that.

    `replan` if an average has moved by more than the threshold since plans were last renewed.
    """

    requests: int
    prefill_factor: float
    decode_factor: float
    prefill_tail: float
    decode_tail: float
    replan: bool


class _Ratio:
    """A moving mean of log ratios, and the window its tail comes from."""

    def __init__(self, adaptation: float) -> None:
        self._moving = MovingMean(adaptation)
        self._window: deque[float] = deque(maxlen=_WINDOW)
        self._renewed_at = 0.0

    def add(self, ratio: float) -> None:
        value = max(-_LARGEST, min(_LARGEST, math.log(ratio)))
        self._window.append(value)
        self._moving.add(value)

    @property
    def _mean(self) -> float:
        return self._moving.value or 0.0

    @property
    def factor(self) -> float:
        return math.exp(self._mean)

    @property
    def tail(self) -> float:
        if len(self._window) < _ENOUGH:
            return 1.0
        ratios = np.exp(np.array(self._window))
        return max(1.0, float(np.percentile(ratios, 97.5) / ratios.mean()))

    def moved(self, threshold: float) -> bool:
        enough = len(self._window) >= _ENOUGH
        return enough and abs(self._mean - self._renewed_at) > math.log(threshold)

    def renew(self) -> None:
        self._renewed_at = self._mean


class Calibration:
    """Compares each plan's bare prediction with what happened.

    `adaptation` is the weight of the newest request, `threshold` the factor at which plans made
    before are worth making again.
    """

    def __init__(self, adaptation: float, *, threshold: float = 1.25) -> None:
        self._threshold = threshold
        self._open: OrderedDict[str, tuple[float, float | None]] = OrderedDict()
        self._prefill, self._decode = _Ratio(adaptation), _Ratio(adaptation)
        self._requests = 0

    def predicted(self, plan_id: str, ttft_s: float, tpot_s: float | None) -> None:
        """Note a plan's warm times as the model gives them, without calibration."""
        self._open[plan_id] = (ttft_s, tpot_s)
        if len(self._open) > _KEPT_PLANS:
            self._open.popitem(last=False)

    def observed(self, plan_id: str, ttft_s: float | None, tpot_s: float | None) -> None:
        """Learn from a finished request; `ttft_s` is None if it waited for cold starts."""
        expected = self._open.pop(plan_id, None)
        if expected is None:
            return
        self._requests += 1
        if ttft_s and expected[0] > 0:
            self._prefill.add(ttft_s / expected[0])
        if tpot_s and expected[1]:
            self._decode.add(tpot_s / expected[1])

    def renew(self) -> None:
        """Note that plans were made from what is known now."""
        self._prefill.renew()
        self._decode.renew()

    @property
    def drift(self) -> Drift:
        return Drift(
            requests=self._requests,
            prefill_factor=self._prefill.factor,
            decode_factor=self._decode.factor,
            prefill_tail=self._prefill.tail,
            decode_tail=self._decode.tail,
            replan=self._prefill.moved(self._threshold) or self._decode.moved(self._threshold),
        )
