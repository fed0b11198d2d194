"""What one configuration of a plan takes and costs, exactly by the tables (10a to 10g).

Costs are means. Limits are checked with the tables of a slower system where one is given, which is
how plans are made robust.

See papers.md A.3 to A.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.optimise.as_built import LayerTables, Outlook
from planner.optimise.paper_model import Estimate
from planner.optimise.system import System

__all__ = ["Limits", "Price", "Pricer"]


@dataclass(frozen=True, slots=True)
class Limits:
    """SLOs; infinite where there is none."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Price:
    """`estimate` is the mean, `ttft_s` and `tpot_s` what limits are checked against, and `excess`
    by what share the worse of them is over its limit."""

    estimate: Estimate
    ttft_s: float
    tpot_s: float
    excess: float

    @property
    def rank(self) -> tuple[float, float]:
        """Feasible first, then cheap; what is not feasible by how far it is off."""
        return (self.excess, self.estimate.cost_usd)


class Pricer:
    """Prices configurations of one demand on one system; `slow` is the system that limits see.

    A configuration is `count` [layers], indices into `outlook.counts`; `spec` [groups]; `replicas`
    [layers]; and `main`, the main function's spec.
    """

    def __init__(
        self, system: System, outlook: Outlook, limits: Limits, slow: System | None
    ) -> None:
        self.system = system
        self.outlook = outlook
        self.limits = limits
        self._slow = slow
        self.starts = system.group_starts
        self.sizes = np.diff(np.append(self.starts, system.layers))
        self.group = np.repeat(np.arange(len(self.starts)), self.sizes)  # [layers]
        self.layers = np.arange(system.layers)
        self._tables: dict[float, tuple[LayerTables, LayerTables]] = {}

    def need_gb(self, count: NDArray[np.intp]) -> float:
        local = self.system.layers * self.system.experts - float(self.outlook.counts[count].sum())
        return self.system.main_need_gb(local, self.outlook.demand.tokens)

    def main_for(self, count: NDArray[np.intp]) -> int:
        return self.system.main.smallest(max(self.need_gb(count), self.system.main_least_gb))

    def tables_for(self, main: int) -> tuple[LayerTables, LayerTables]:
        """Mean and slow tables for the main function's vCPUs."""
        vcpus = float(self.system.main.vcpus[main])
        if vcpus not in self._tables:
            mean = LayerTables(self.system, self.outlook, vcpus)
            slow = mean if self._slow is None else LayerTables(self._slow, self.outlook, vcpus)
            self._tables[vcpus] = (mean, slow)
        return self._tables[vcpus]

    def held_gb(self, count: NDArray[np.intp]) -> NDArray[np.float64]:
        """What each group's function must hold, [groups] (10e)."""
        system = self.system
        experts = self.outlook.counts[count].astype(np.float64)
        if system.granularity == "expert":
            held = np.minimum(1, experts) * system.remote_expert_gb
        else:
            held = np.add.reduceat(experts, self.starts) * system.remote_expert_gb
        return held + system.expert_runtime_gb

    def budgets(self, tables: LayerTables) -> NDArray[np.float64]:
        """Seconds left to the experts for TTFT and for a token."""
        system = tables.system
        return np.array(
            [
                self.limits.ttft_s - system.cold_start_s - tables.dense_prefill_s,
                self.limits.tpot_s - tables.dense_step_s,
            ]
        )

    def price(
        self,
        count: NDArray[np.intp],
        spec: NDArray[np.intp],
        replicas: NDArray[np.intp],
        main: int,
    ) -> Price:
        """Price one configuration, exactly by the tables."""
        tables, slow = self.tables_for(main)
        demand = self.outlook.demand
        spec_of = spec[self.group]
        cell = (self.layers, count, spec_of)
        experts_s, prefill_usd = self._prefill_of(tables, count, spec_of, replicas)
        prefill_s = tables.dense_prefill_s + float(experts_s.sum())
        step_s = tables.dense_step_s + float(tables.step_s[cell].sum())
        if slow is tables:
            late_prefill_s, late_step_s = prefill_s, step_s
        else:
            late_s, _ = self._prefill_of(slow, count, spec_of, replicas)
            late_prefill_s = slow.dense_prefill_s + float(late_s.sum())
            late_step_s = slow.dense_step_s + float(slow.step_s[cell].sum())
        ttft_s = late_prefill_s + slow.system.cold_start_s
        tpot_s = late_step_s if demand.decode_tokens > 0 else 0.0
        decode_s = demand.decode_tokens * step_s
        estimate = Estimate(
            prefill_s=prefill_s,
            decode_s=decode_s,
            ttft_s=prefill_s + self.system.cold_start_s,
            tpot_s=step_s if demand.decode_tokens > 0 else 0.0,
            main_usd=(prefill_s + decode_s) * self.system.main_usd_per_s(main, demand.tokens),
            remote_prefill_usd=float(prefill_usd.sum()),
            remote_decode_usd=demand.decode_tokens * float(tables.step_usd[cell].sum()),
            largest_payload_bytes=self._largest_payload_bytes(count),
        )
        over = max(
            0.0,
            ttft_s / self.limits.ttft_s - 1 - 1e-9,
            tpot_s / self.limits.tpot_s - 1 - 1e-9,
        )
        return Price(estimate, ttft_s, tpot_s, over)

    def _largest_payload_bytes(self, count: NDArray[np.intp]) -> float:
        rows = float(self.outlook.distinct_rows[self.layers, count].max(initial=0))
        return min(rows, self.system.rows_per_call) * self.system.token_bytes

    def _prefill_of(
        self,
        tables: LayerTables,
        count: NDArray[np.intp],
        spec_of: NDArray[np.intp],
        replicas: NDArray[np.intp],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds and USD of every layer's prefill with its own spec and replicas, [layers]."""
        seconds, usd = self.prefill_by_spec(tables, count, replicas)
        return seconds[self.layers, spec_of], usd[self.layers, spec_of]

    def prefill_by_spec(
        self, tables: LayerTables, count: NDArray[np.intp], replicas: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds and USD of every layer's prefill, [layers, specs], for its own replicas."""
        shape = (self.system.layers, len(self.system.remote))
        seconds, usd = np.empty(shape), np.empty(shape)
        for z in np.unique(replicas):
            of_z = replicas == z
            of_all = tables.prefill_with(count, int(z))
            seconds[of_z], usd[of_z] = of_all[0][of_z], of_all[1][of_z]
        return seconds, usd
