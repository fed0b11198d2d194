"""CPU allocations, made as serverless platforms make them: whole threads, and a share of the time.

A function with half a vCPU may run half of each period (CFS bandwidth control). Here the measured
process is stopped and continued likewise, which needs no privilege.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

from remoe.errors import SettingsError

__all__ = ["allocations_of", "measure_expert_speed"]

_PERIOD_S = 0.02
_FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_FINER = (0.125, 0.375)


def allocations_of(cores: int) -> list[float]:
    """At least six allocations up to the cores there are, at most eight vCPUs."""
    found = [share for share in _FRACTIONS if share <= cores]
    return found if len(found) >= 6 else sorted([*found, *_FINER])


def measure_expert_speed(
    model_dir: Path, vcpus: float, rows: list[int], *, seconds: float
) -> list[float]:
    """Seconds a call of one expert with so many rows each, on so many vCPUs."""
    threads = max(1, math.ceil(vcpus))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "remoe.cli.hardware.expert_speed", str(model_dir)),
            *(str(threads), str(seconds), *map(str, rows)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None  # noqa: S101  # it is a pipe
    try:
        process.stdout.readline()  # weights are read: from here on the share counts
        _hold_to(process, vcpus / threads)
        output, errors = process.communicate(timeout=60)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    values = [float(line) for line in output.split()]
    if len(values) != len(rows):
        raise SettingsError(f"measuring experts failed: {errors.strip()[-500:]}")
    return values


def _hold_to(process: subprocess.Popen[str], share: float) -> None:
    """Let it run for a share of each period until it ends."""
    if share >= 1:
        return
    while process.poll() is None:
        process.send_signal(signal.SIGCONT)
        before = time.perf_counter()
        time.sleep(_PERIOD_S * share)
        process.send_signal(signal.SIGSTOP)
        # On a busy machine it ran longer than asked for: it then rests longer too.
        time.sleep((time.perf_counter() - before) * (1 - share) / share)
