"""How fast requests are to come over time: constant stages, and linear or exponential ramps.

With L(t) the integral of the rate, a unit-rate process x becomes one of that rate as L^-1(x)
(time rescaling), so that one formula serves every arrival family on every profile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from math import exp, isclose, log, sqrt

from remoe.errors import SettingsError

__all__ = ["RateProfile", "Stage"]

_STAGE = re.compile(
    r"(?P<first>\d+(?:\.\d+)?)(?:(?P<kind>\.\.|\^)(?P<last>\d+(?:\.\d+)?))?"
    r"@(?P<length>\d+(?:\.\d+)?)(?P<unit>s|m|h)?"
)
_UNIT_S = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Stage:
    """From `first_rps` to `last_rps` in `length_s` seconds, linearly or exponentially."""

    first_rps: float
    last_rps: float
    length_s: float
    exponential: bool = False

    @property
    def requests(self) -> float:
        """The expected number: the integral of the rate."""
        if self.exponential and not isclose(self.first_rps, self.last_rps):
            return self.length_s * (self.last_rps - self.first_rps) / self._log_ratio
        return self.length_s * (self.first_rps + self.last_rps) / 2

    def time_of(self, count: float) -> float:
        """Seconds into the stage at which `count` (up to `requests`) are expected."""
        if count <= 0:
            return 0.0
        if isclose(self.first_rps, self.last_rps):
            return count / self.first_rps
        if self.exponential:
            growth = self._log_ratio / self.length_s
            return log(1 + count * growth / self.first_rps) / growth
        slope = (self.last_rps - self.first_rps) / self.length_s
        # The root of slope/2 t^2 + first t = count, in the form that does not cancel.
        root = sqrt(max(0.0, self.first_rps**2 + 2 * slope * count))
        return 2 * count / (self.first_rps + root)

    def rate_at(self, time_s: float) -> float:
        share = time_s / self.length_s
        if self.exponential:
            return self.first_rps * exp(share * self._log_ratio)
        return self.first_rps + share * (self.last_rps - self.first_rps)

    @property
    def _log_ratio(self) -> float:
        return log(self.last_rps / self.first_rps)


@dataclass(frozen=True, slots=True)
class RateProfile:
    """Stages one after the other."""

    stages: tuple[Stage, ...]

    @classmethod
    def constant(cls, rate_rps: float, duration_s: float) -> RateProfile:
        return cls((Stage(rate_rps, rate_rps, duration_s),))

    @classmethod
    def parse(cls, text: str) -> RateProfile:
        """Read `2@60s,2..10@2m,1^16@90s`: a stage, a linear ramp, an exponential ramp.

        Raises SettingsError that names the stage.
        """
        stages = []
        for part in text.split(","):
            found = _STAGE.fullmatch(part.strip())
            if found is None:
                raise SettingsError(
                    f"the stage {part.strip()!r} is not like 2@60s (requests/s for so long), "
                    "2..10@60s (linear ramp) or 1^16@60s (exponential ramp)"
                )
            first = float(found["first"])
            last = float(found["last"] or first)
            length_s = float(found["length"]) * _UNIT_S[found["unit"]]
            exponential = found["kind"] == "^"
            if length_s <= 0:
                raise SettingsError(f"the stage {part.strip()!r} has no length")
            if exponential and min(first, last) <= 0:
                raise SettingsError(
                    f"the stage {part.strip()!r}: an exponential ramp cannot begin or end at 0"
                )
            stages.append(Stage(first, last, length_s, exponential))
        profile = cls(tuple(stages))
        if profile.requests <= 0:
            raise SettingsError("every stage has rate 0: nothing would be sent")
        return profile

    @property
    def duration_s(self) -> float:
        return sum(stage.length_s for stage in self.stages)

    @property
    def requests(self) -> float:
        return sum(stage.requests for stage in self.stages)

    def time_of(self, count: float) -> float:
        """When the `count`-th request is expected; the end for more than there are."""
        begin_s = done = 0.0
        for stage in self.stages:
            if count < done + stage.requests:
                return begin_s + stage.time_of(count - done)
            begin_s += stage.length_s
            done += stage.requests
        return begin_s

    def stage_at(self, time_s: float) -> int:
        """The index of the stage that a time falls into."""
        ends = accumulate(stage.length_s for stage in self.stages)
        return next((i for i, end in enumerate(ends) if time_s < end), len(self.stages) - 1)
