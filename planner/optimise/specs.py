"""Memory specs a platform sells: how many vCPUs each brings, and what it costs a second (A.2).

The paper assumes 1 GB = 1 vCPU. Real platforms differ: Lambda gives a vCPU per 1,769 MB, Cloud Run
and Fargate sell steps of whole and partial vCPUs and bill memory and vCPUs apart. Everything here
works on the table alone, so a new platform is a new table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from remoe.prices import DEFAULT_PRICES

__all__ = ["PLATFORMS", "Platform", "SpecTable", "platform_specs", "proportional"]

Platform = Literal["proportional", "lambda", "cloud-run", "fargate"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)

_MIB_GB = 2**20 / 1e9
_GIB_GB = 2**30 / 1e9


@dataclass(frozen=True, slots=True)
class SpecTable:
    """Specs in ascending memory: `memory_gb`, `vcpus` and `usd_per_s`, float64 [specs] each."""

    memory_gb: NDArray[np.float64]
    vcpus: NDArray[np.float64]
    usd_per_s: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not len(self.memory_gb) == len(self.vcpus) == len(self.usd_per_s) > 0:
            raise ValueError("a spec table needs memory, vCPUs and a price for each spec")
        if (np.diff(self.memory_gb) < 0).any():
            raise ValueError("specs must be in ascending memory")
        if (self.vcpus <= 0).any() or (self.usd_per_s < 0).any():
            raise ValueError("every spec needs vCPUs above 0 and a price of at least 0")

    def __len__(self) -> int:
        return len(self.memory_gb)

    def smallest(self, memory_gb: float) -> int:
        """The index of the smallest spec that holds so much; ValueError if none does."""
        index = int(np.searchsorted(self.memory_gb, memory_gb - 1e-12))
        if index == len(self):
            raise ValueError(
                f"{memory_gb:.3f} GB is more than the largest spec, {self.memory_gb[-1]:.3f} GB"
            )
        return index


def proportional(
    memory_gb: Sequence[float] | NDArray[np.float64],
    *,
    gb_per_vcpu: float = 1.0,
    usd_per_gb_s: float = DEFAULT_PRICES.cpu_usd_per_gb_s,
) -> SpecTable:
    """The paper's rule: vCPUs in proportion to memory, and memory alone is billed."""
    memory = np.asarray(memory_gb, np.float64)
    return SpecTable(memory, memory / gb_per_vcpu, memory * usd_per_gb_s)


def _paper(most_gb: float, usd_per_gb_s: float) -> SpecTable:
    # 100 MB steps from 200 MB, as the paper's evaluation of GPT2-moe (A.13).
    steps = max(1, round((most_gb - 0.2) / 0.1) + 1)
    memory = np.linspace(0.2, 0.1 + 0.1 * steps, steps)
    return proportional(memory, usd_per_gb_s=usd_per_gb_s)


def _lambda(most_gb: float, usd_per_gb_s: float) -> SpecTable:
    # https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html: 128 MB to 10,240 MB,
    # one vCPU at 1,769 MB; $0.0000166667 per GB-s, whatever the caller's own price.
    memory_mib = np.arange(128, 10_240 + 1, 64, dtype=np.float64)
    memory = memory_mib * _MIB_GB
    return _up_to(SpecTable(memory, memory_mib / 1769, memory_mib / 1024 * 1.66667e-5), most_gb)


# vCPUs and the memory they can have, in GiB, from least to most.
_CLOUD_RUN = ((1, 0.5, 4), (2, 0.5, 8), (4, 2, 16), (6, 4, 24), (8, 4, 32))
_FARGATE = (
    *((0.25, 0.5, 2), (0.5, 1, 4), (1, 2, 8), (2, 4, 16)),
    *((4, 8, 30), (8, 16, 60), (16, 32, 120)),
)


def _cloud_run(most_gb: float, usd_per_gb_s: float) -> SpecTable:
    # https://cloud.google.com/run/docs/configuring/services/cpu and its tier-1 price list.
    return _stepped(_CLOUD_RUN, 0.5, 2.4e-5, 2.5e-6, most_gb)


def _fargate(most_gb: float, usd_per_gb_s: float) -> SpecTable:
    # https://docs.aws.amazon.com/AmazonECS/latest/developerguide/fargate-tasks-services.html;
    # us-east-1, Linux on x86: $0.04048 per vCPU-hour and $0.004445 per GB-hour.
    return _stepped(_FARGATE, 0.5, 0.04048 / 3600, 0.004445 / 3600, most_gb)


def _stepped(
    sizes: Sequence[tuple[float, float, float]],
    step_gib: float,
    usd_per_vcpu_s: float,
    usd_per_gib_s: float,
    most_gb: float,
) -> SpecTable:
    """Each number of vCPUs with each memory it allows, in steps; billed by both."""
    rows = [
        (gib * _GIB_GB, vcpus, vcpus * usd_per_vcpu_s + gib * usd_per_gib_s)
        for vcpus, least, most in sizes
        for gib in np.arange(least, most + step_gib / 2, step_gib if vcpus < 2 else 2 * step_gib)
    ]
    columns = np.array(sorted(rows)).T
    return _up_to(SpecTable(columns[0], columns[1], columns[2]), most_gb)


def _up_to(table: SpecTable, most_gb: float) -> SpecTable:
    kept = table.memory_gb <= most_gb + 1e-9
    kept[0] = True
    return SpecTable(table.memory_gb[kept], table.vcpus[kept], table.usd_per_s[kept])


_TABLES: dict[Platform, Callable[[float, float], SpecTable]] = {
    "proportional": _paper,
    "lambda": _lambda,
    "cloud-run": _cloud_run,
    "fargate": _fargate,
}


def platform_specs(
    platform: Platform,
    *,
    most_gb: float,
    usd_per_gb_s: float = DEFAULT_PRICES.cpu_usd_per_gb_s,
) -> SpecTable:
    """The specs of a platform up to `most_gb`; `usd_per_gb_s` prices the proportional one."""
    return _TABLES[platform](most_gb, usd_per_gb_s)
