"""Memory and open files of the platform's processes while it is under load."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.e2e.platform import Platform

__all__ = ["ROLES", "Watch"]

ROLES = ("gateway", "planner", "main_model_fn", "expert_fn")
_SAMPLE_PERIOD_S = 2.0
# Longer than the gateway keeps idle connections, which it looks for every 30 s.
_SETTLE_S = 70.0


@dataclass(frozen=True)
class Sample:
    """A process when `over` requests were over; its open files by path, or kind if they have none."""

    over: int
    rss_mib: float
    files: Counter[str]


@dataclass
class Watch:
    """Memory and open files of every process."""

    platform: Platform
    over: int = 0
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    before: dict[str, Counter[str]] = field(default_factory=dict)
    """The open files of each role, before the load."""

    def look(self) -> None:
        found = [("supervisor", self.platform.process.pid)]
        found += [(role, pid) for role in ROLES for pid in self._pids(role)]
        for role, pid in found:
            with contextlib.suppress(psutil.Error, OSError):  # it ended just now
                rss_mib = psutil.Process(pid).memory_info().rss / 2**20
                self.samples[role, pid].append(Sample(self.over, rss_mib, _open_files(pid)))

    def _pids(self, role: str) -> list[int]:
        with contextlib.suppress(OSError):  # one ended just now
            return self.platform.pids_of(role)
        return []

    def load_begins(self) -> None:
        self.look()
        self.before = {role: self.files(role) for role in ("supervisor", *ROLES)}

    def files(self, role: str) -> Counter[str]:
        """What the role's newest process had open when it was last looked at."""
        lives = [taken for (name, _), taken in self.samples.items() if name == role]
        return lives[-1][-1].files if lives else Counter()

    def most_files(self, role: str) -> int:
        return max(
            sample.files.total()
            for (name, _), taken in self.samples.items()
            if name == role
            for sample in taken
        )

    def settle(self) -> None:
        """Look on until idle connections must have been closed."""
        ends_at = time.monotonic() + _SETTLE_S
        while time.monotonic() < ends_at:
            time.sleep(_SAMPLE_PERIOD_S)
            self.look()

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(_SAMPLE_PERIOD_S)

    def growth_mib(self, role: str) -> tuple[float, float]:
        """Of the longest-lived process: growth over the second half of its life under load by a
        straight line, and its last memory."""
        lives = [taken for (name, _), taken in self.samples.items() if name == role]
        longest = [sample for sample in max(lives, key=len) if sample.over < self.over]
        half = [(sample.over, sample.rss_mib) for sample in longest[len(longest) // 2 :]]
        if len(half) < 3:
            return 0.0, half[-1][1] if half else 0.0
        overs, rss_mib = np.asarray(half, dtype=float).T  # [samples] each
        if np.ptp(overs) == 0:
            return 0.0, longest[-1].rss_mib
        slope = float(np.polyfit(overs, rss_mib, 1)[0])
        return slope * float(np.ptp(overs)), longest[-1].rss_mib


def _open_files(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            found[entry.readlink().name.partition(":[")[0]] += 1
    return found
