"""What the platform under load looks like from outside: replicas, memory, cold starts, experts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import msgspec

from loadgen.clock import Clock
from remoe.activation_totals import ActivationTotals

__all__ = [
    "FunctionSample",
    "PlatformFigures",
    "PlatformProbe",
    "PlatformSample",
    "Sampler",
    "platform_figures",
    "read_samples",
]


class FunctionSample(msgspec.Struct, frozen=True, kw_only=True):
    """One function now. `gb` and `busy_gb` are its replicas' memory limits together, and those of
    replicas with a request in flight; cold starts count from the platform's start."""

    name: str
    ready: int
    starting: int
    gb: float
    busy_gb: float
    cold_starts: int
    cold_start_total_ms: float


class PlatformSample(msgspec.Struct, frozen=True, kw_only=True):
    """`at_s` counts from the run's zero."""

    at_s: float
    functions: list[FunctionSample]

    @property
    def gb(self) -> float:
        return sum(function.gb for function in self.functions)


class PlatformProbe(Protocol):
    """Looks at a platform; called in a thread. None where it cannot be seen (any more)."""

    def functions(self) -> list[FunctionSample] | None: ...

    def activations(self) -> ActivationTotals | None: ...


class Sampler:
    """Samples the platform once a period into `platform.jsonl`, until closed."""

    def __init__(
        self, probe: PlatformProbe, path: Path, *, clock: Clock, zero: float, period_s: float = 1.0
    ) -> None:
        self.samples: list[PlatformSample] = []
        self._probe = probe
        self._path = path
        self._clock = clock
        self._zero = zero
        self._period_s = period_s

    async def run(self) -> None:
        moment = self._clock.now()
        while True:
            await self.take()
            moment += self._period_s
            await self._clock.sleep_until(moment)

    async def take(self) -> None:
        """Take one sample now."""
        functions = await asyncio.to_thread(self._probe.functions)
        if functions is not None:
            sample = PlatformSample(at_s=self._clock.now() - self._zero, functions=functions)
            self.samples.append(sample)
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(sample) + b"\n")


def read_samples(path: Path) -> list[PlatformSample]:
    """All whole lines of a `platform.jsonl`; empty without one."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        msgspec.json.decode(line, type=PlatformSample) for line in lines if line.endswith(b"\n")
    ]


class PlatformFigures(msgspec.Struct, frozen=True, kw_only=True):
    """resident_gb_s: memory held times time, all functions. idle_share: the part of it in replicas
    without a request. cold_starts: of functions, in this run."""

    seconds: float
    resident_gb_s: float
    idle_gb_s: float
    idle_share: float
    cold_starts: int
    cold_start_total_ms: float
    most_replicas: int


def platform_figures(samples: Sequence[PlatformSample]) -> PlatformFigures | None:
    """Integrate the samples, each held until the next; None for fewer than two."""
    if len(samples) < 2:
        return None
    resident = idle = 0.0
    for sample, following in pairwise(samples):
        length_s = following.at_s - sample.at_s
        resident += sample.gb * length_s
        idle += length_s * sum(function.gb - function.busy_gb for function in sample.functions)
    first, last = samples[0], samples[-1]
    return PlatformFigures(
        seconds=last.at_s - first.at_s,
        resident_gb_s=resident,
        idle_gb_s=idle,
        idle_share=idle / resident if resident else 0.0,
        cold_starts=sum(f.cold_starts for f in last.functions)
        - sum(f.cold_starts for f in first.functions),
        cold_start_total_ms=sum(f.cold_start_total_ms for f in last.functions)
        - sum(f.cold_start_total_ms for f in first.functions),
        most_replicas=max(sum(f.ready + f.starting for f in s.functions) for s in samples),
    )
