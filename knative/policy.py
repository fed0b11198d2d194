"""How a function scales: Knative's autoscaling annotations, read, checked and typed.

Keys, defaults and ranges are those of Knative Serving's `config-autoscaler` and of its annotation
validation. A misspelt key would silently mean "default" on a cluster; here it is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from knative.durations import format_duration, parse_duration
from remoe.errors import SettingsError

__all__ = ["AUTOSCALING", "PROGRESS_DEADLINE", "ScalingPolicy"]

AUTOSCALING = "autoscaling.knative.dev/"
PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"

_MAX_WINDOW_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """The checked meaning of a function's annotations; percentages stay percentages.

    `max_scale` 0 is unbounded. `target` is requests in flight per replica, None for Knative's
    default (the container concurrency, or 100).
    """

    min_scale: int = 0
    max_scale: int = 0
    initial_scale: int = 1
    activation_scale: int = 1
    target: float | None = None
    target_utilization_percentage: float = 70.0
    target_burst_capacity: float = 211.0
    window_s: float = 60.0
    panic_window_percentage: float = 10.0
    panic_threshold_percentage: float = 200.0
    retention_s: float = 0.0
    scale_down_delay_s: float = 0.0
    progress_deadline_s: float = 600.0

    @classmethod
    def from_annotations(cls, annotations: Mapping[str, str]) -> ScalingPolicy:
        """Read Knative's annotations; raises SettingsError naming the key and what it may be."""
        values: dict[str, int | float] = {}
        for key, text in annotations.items():
            if key in _FIXED:
                if text != _FIXED[key]:
                    raise SettingsError(f"{key} can only be {_FIXED[key]!r}, not {text!r}")
            elif key in _READERS:
                field, read = _READERS[key]
                try:
                    values[field] = read(text)
                except ValueError as error:
                    raise SettingsError(f"annotation {key}: {error}") from None
            elif "knative.dev/" in key and not key.startswith(_PASSED_ON):
                raise SettingsError(f"unknown annotation {key}{_suggestion(key)}")
        policy = cls(**values)  # type: ignore[arg-type]  # each reader returns its field's type
        policy._check_bounds()
        return policy

    def target_concurrency(self, container_concurrency: int) -> float:
        """Mean requests in flight to aim at per replica; a hard limit caps the soft target."""
        limit = float(container_concurrency) if container_concurrency else None
        total = self.target if self.target is not None else (limit or 100.0)
        if limit is not None:
            total = min(total, limit)
        return max(0.01, total * self.target_utilization_percentage / 100)

    @property
    def panic_window_s(self) -> float:
        return self.window_s * self.panic_window_percentage / 100

    def _check_bounds(self) -> None:
        if self.max_scale:
            for name in ("min_scale", "activation_scale", "initial_scale"):
                value = getattr(self, name)
                if value > self.max_scale:
                    raise SettingsError(
                        f"max-scale {self.max_scale} is less than {name.replace('_', '-')} {value}"
                    )


def _count(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def _number(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise ValueError(f"{text} is out of range: {limits}")
        return value

    return read


def _duration(least_s: float, most_s: float, *, whole: bool = False) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = parse_duration(text)
        if not least_s <= value <= most_s:
            limits = f"{format_duration(least_s)} to {format_duration(most_s)}"
            raise ValueError(f"{text} is out of range: {limits}")
        if whole and value != int(value):
            raise ValueError(f"{text} is not a whole number of seconds")
        return value

    return read


def _burst_capacity(text: str) -> float:
    return -1.0 if text == "-1" else _number(0, float("inf"))(text)


_INFINITY = float("inf")
_READERS: dict[str, tuple[str, Callable[[str], int | float]]] = {
    AUTOSCALING + "min-scale": ("min_scale", _count(0)),
    AUTOSCALING + "max-scale": ("max_scale", _count(0)),
    AUTOSCALING + "initial-scale": ("initial_scale", _count(0)),
    AUTOSCALING + "activation-scale": ("activation_scale", _count(2)),
    AUTOSCALING + "target": ("target", _number(0.01, _INFINITY)),
    AUTOSCALING + "target-utilization-percentage": (
        "target_utilization_percentage",
        _number(1, 100),
    ),
    AUTOSCALING + "target-burst-capacity": ("target_burst_capacity", _burst_capacity),
    AUTOSCALING + "window": ("window_s", _duration(6, _MAX_WINDOW_S, whole=True)),
    AUTOSCALING + "panic-window-percentage": ("panic_window_percentage", _number(1, 100)),
    AUTOSCALING + "panic-threshold-percentage": (
        "panic_threshold_percentage",
        _number(110, 1000),
    ),
    AUTOSCALING + "scale-to-zero-pod-retention-period": (
        "retention_s",
        _duration(0, _MAX_WINDOW_S),
    ),
    AUTOSCALING + "scale-down-delay": (
        "scale_down_delay_s",
        _duration(0, _MAX_WINDOW_S, whole=True),
    ),
    PROGRESS_DEADLINE: ("progress_deadline_s", _duration(1, _INFINITY)),
}
# Knative knows other values of these; Remoe's functions use one.
_FIXED = {
    AUTOSCALING + "class": "kpa.autoscaling.knative.dev",
    AUTOSCALING + "metric": "concurrency",
    AUTOSCALING + "metric-aggregation-algorithm": "linear",
}
# Meant for the cluster's own parts, without effect on how a function scales.
_PASSED_ON = ("queue.sidecar.serving.knative.dev/", "networking.knative.dev/")


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, [*_READERS, *_FIXED], n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(_READERS))}"
