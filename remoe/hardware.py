"""What a machine was measured to take: the file that `remoe profile hardware` writes.

Times are medians in seconds. The planner reads the newest file and predicts from it before any
request has run (A.11's fit of expert time by CPU allocation is here, with its fallback).
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.errors import SettingsError

__all__ = [
    "AllocationCurve",
    "CallTimes",
    "ColdStart",
    "ExpertRows",
    "ExponentialFit",
    "HardwareProfile",
    "Spread",
    "newest_profile",
]

MIN_R_SQUARED = 0.95
"""Below it the exponential is not what was measured, and the measured table serves instead."""
_FOLDER = "hardware"


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A time that varies: what to expect of it, and what to be ready for.

    Two SLOs that each hold at 97.5 % both hold at 95 %, so that percentile is kept too.
    """

    mean_s: float
    median_s: float
    p95_s: float
    p975_s: float

    @classmethod
    def of(cls, samples_s: NDArray[np.float64] | list[float]) -> Spread:
        """Summarise samples; percentiles are numpy's linear ones."""
        median, p95, p975 = (float(np.percentile(samples_s, q)) for q in (50, 95, 97.5))
        return cls(mean_s=float(np.mean(samples_s)), median_s=median, p95_s=p95, p975_s=p975)

    @classmethod
    def fixed(cls, value_s: float) -> Spread:
        return cls(mean_s=value_s, median_s=value_s, p95_s=value_s, p975_s=value_s)

    def plus(self, more_s: float) -> Spread:
        """The same later: what is always added varies no more."""
        return Spread(
            mean_s=self.mean_s + more_s,
            median_s=self.median_s + more_s,
            p95_s=self.p95_s + more_s,
            p975_s=self.p975_s + more_s,
        )


class ExponentialFit(msgspec.Struct, frozen=True, kw_only=True):
    """T(y) = θ1 exp(-θ2 y) + θ3 with all θ > 0, y in vCPUs (the paper's relaxation, A.11)."""

    theta1: float
    theta2: float
    theta3: float
    r_squared: float

    @classmethod
    def of(cls, vcpus: NDArray[np.float64], seconds: NDArray[np.float64]) -> ExponentialFit:
        """Least squares; for a given θ2 the other two are linear, so θ2 alone is searched."""
        best: tuple[float, float, float, float] | None = None
        scale = 1 / float(np.median(vcpus))
        for theta2 in scale * np.geomspace(0.02, 50, 400):
            basis = np.exp(-theta2 * vcpus)
            theta1, theta3 = _line(basis, seconds)
            if theta3 <= 0:  # the constraint binds: refit through a floor just above zero
                theta3 = 1e-9 * float(seconds.min())
                theta1 = float(basis @ (seconds - theta3) / (basis @ basis))
            error = float(((theta1 * basis + theta3 - seconds) ** 2).sum())
            if theta1 > 0 and (best is None or error < best[0]):
                best = (error, theta1, float(theta2), theta3)
        total = float(((seconds - seconds.mean()) ** 2).sum())
        if best is None or total == 0:
            # Time does not fall with vCPUs: no exponential with positive θ says that.
            return cls(theta1=0.0, theta2=scale, theta3=float(seconds.mean()), r_squared=0.0)
        error, theta1, theta2, theta3 = best
        return cls(theta1=theta1, theta2=theta2, theta3=theta3, r_squared=1 - error / total)

    def seconds(self, vcpus: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.theta1 * np.exp(-self.theta2 * vcpus) + self.theta3
        return result


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    return slope, float(y.mean() - slope * x.mean())


class AllocationCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by vCPUs: measured points, and their exponential fit if it holds.

    With one point time is taken as inverse to vCPUs. Outside the measured range the table's end
    values are scaled likewise below it (a fraction of a core is a fraction of its time) and kept
    above it (nobody measured that more cores help).
    """

    vcpus: list[float]
    measured_s: list[float]
    fit: ExponentialFit | None = None

    @classmethod
    def of(cls, vcpus: list[float], measured_s: list[float]) -> AllocationCurve:
        """Fit the points, and keep the fit only if R² is at least `MIN_R_SQUARED`."""
        fit = ExponentialFit.of(np.array(vcpus), np.array(measured_s))
        kept = fit if fit.r_squared >= MIN_R_SQUARED else None
        return cls(vcpus=vcpus, measured_s=measured_s, fit=kept)

    @classmethod
    def inverse(cls, seconds_at_one_vcpu: float) -> AllocationCurve:
        return cls(vcpus=[1.0], measured_s=[seconds_at_one_vcpu])

    def seconds(self, vcpus: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds on each allocation, from the fit inside the measured range or from the table."""
        points, values = np.array(self.vcpus), np.array(self.measured_s)
        if len(points) == 1:
            return np.asarray(values[0] * points[0] / vcpus, np.float64)
        # Time x vCPUs is the smooth thing to interpolate: it is constant under perfect scaling.
        work = np.interp(vcpus, points, values * points)
        inside = np.minimum(vcpus, points[-1])
        table = work / inside
        if self.fit is None:
            return np.asarray(table, np.float64)
        fitted = self.fit.seconds(inside)
        return np.where(vcpus < points[0], table, fitted)


class ExpertRows(msgspec.Struct, frozen=True, kw_only=True):
    """τ^c: one expert's time for so many rows, by vCPUs."""

    rows: int
    curve: AllocationCurve


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """From nothing to the first answer, phase by phase, in order."""

    phases: dict[str, Spread]
    total: Spread


class CallTimes(msgspec.Struct, frozen=True, kw_only=True):
    """t^rem: what a warm call takes beside computing, and how that grows with what it carries."""

    invocation: Spread
    bandwidth_bytes_per_s: float

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `python -m main_model_fn.call_times` printed; raises SettingsError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise SettingsError(
                f"{path} does not hold times of calls: {error}. "
                "`python -m main_model_fn.call_times` in a main function's container prints them."
            ) from error


class HardwareProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One machine and one model, measured.

    `non_expert_rows` and `non_expert_s` are τ^f: the time of all layers' non-expert part for so
    many tokens of one prompt; `non_expert_step_s` is t^f, of one decoded token, all layers.
    `move_s_per_token` is τ^sw a layer, one way; 0 without a GPU.
    `main_vcpus` are the cores the main function had, `main_on_gpu` whether it used a GPU beside.
    `bandwidth_bytes_per_s` and `invocation` are of one warm call of an expert function,
    `read_bytes_per_s` is how fast experts come from the disk.
    """

    measured_at: str
    host: dict[str, str]
    model: str
    model_digest: str
    kernel: str
    expert: list[ExpertRows]
    non_expert_rows: list[int]
    non_expert_s: list[float]
    non_expert_step_s: float
    move_s_per_token: float
    bandwidth_bytes_per_s: float
    read_bytes_per_s: float
    invocation: Spread
    expert_cold_start: ColdStart
    main_cold_start: ColdStart
    main_vcpus: float
    main_on_gpu: bool = False

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a profile; raises SettingsError that names the file and what to do."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise SettingsError(
                f"cannot read the hardware profile {path}: {error.strerror}. "
                "`remoe profile hardware` writes one."
            ) from error
        except msgspec.DecodeError as error:
            raise SettingsError(
                f"{path} is not a hardware profile: {error}. Measure again with "
                "`remoe profile hardware`."
            ) from error

    def save(self, home: Path) -> Path:
        """Write it into `home`'s folder of profiles, named by date and model; returns the path."""
        folder = home / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.measured_at.replace(":", "").replace("-", "")
        path = folder / f"{stamp}-{self.model}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))
        return path


def newest_profile(home: Path, model: str) -> Path | None:
    """The latest profile of a model in `home`, by the date in its name."""
    found = sorted((home / _FOLDER).glob(f"*-{model}.json"))
    return found[-1] if found else None
