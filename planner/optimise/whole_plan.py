"""The whole plan of (10): which experts are remote, with how much memory and how many replicas.

The paper takes the largest ratio b that holds the SLOs, the same for all layers, and then
optimises memory and replicas (A.9 to A.12). Here b is the one whose predicted cost is least among
those that hold, and may then differ from layer to layer (planner/optimise/by_layer.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.optimise.as_built import Demand, Outlook, remote_counts
from planner.optimise.by_layer import LayerRefiner
from planner.optimise.knapsack import choose
from planner.optimise.paper_model import Estimate
from planner.optimise.pricing import Limits, Pricer
from planner.optimise.settling import Settler, Solver, State
from planner.optimise.system import System

__all__ = ["Limits", "RatioRule", "Solver", "WholePlan", "WholePlanner"]

RatioRule = Literal["fixed", "largest", "cost", "per-layer"]
_TRIES = 3
_FEW_EXPERTS = 128  # up to so many, splits among replicas cost nothing to try


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePlan:
    """Decisions for every layer with experts, and what they should take.

    `counts` are remote experts, `specs` the spec of each layer's function (equal inside a block).
    `estimate` is the mean, `limit_ttft_s` and `limit_tpot_s` what the SLOs were checked against.
    """

    counts: NDArray[np.intp]
    specs: NDArray[np.intp]
    replicas: NDArray[np.intp]
    main: int
    remote: NDArray[np.bool_]  # [layers, experts]
    estimate: Estimate
    limit_ttft_s: float
    limit_tpot_s: float
    feasible: bool


class WholePlanner:
    """Searches plans for one demand on one system; `slow` is the system that limits see.

    `most_remote` is the largest count of remote experts of a layer; with `remote`, [layers,
    experts], the partition is that and only specs and replicas are chosen. ValueError if the main
    function's largest spec does not hold what must stay local.
    """

    def __init__(
        self,
        system: System,
        demand: Demand,
        *,
        limits: Limits | None = None,
        slow: System | None = None,
        most_remote: int | None = None,
        remote: NDArray[np.bool_] | None = None,
        solver: Solver = choose,
    ) -> None:
        most = system.experts if most_remote is None else most_remote
        counts = remote_counts(system.experts, most)
        if remote is not None:
            counts = np.unique(np.append(remote.sum(axis=1), [0]))
        self._remote = remote
        self.system = system
        self.outlook = Outlook(system, demand, counts, remote)
        self.limits = limits or Limits()
        self._pricer = Pricer(system, self.outlook, self.limits, slow)
        self._settler = Settler(self._pricer, solver)
        self._refiner = LayerRefiner(self._pricer, self._settler, solver)

    def plan(self, rule: RatioRule = "cost") -> WholePlan:
        """The best plan by a rule for b; with `fixed` the largest count there is.

        ValueError if the functions' largest specs hold no partition.
        """
        if self._remote is not None:
            index = np.searchsorted(self.outlook.counts, self._remote.sum(axis=1))
            state = self._settler.with_specs(index, self._pricer.main_for(index))
            if state is None:
                raise ValueError(self._does_not_fit)
            return self._finished(self._settler.settled(state))
        uniform = self._uniform(rule)
        if rule != "per-layer":
            return self._finished(uniform[0])
        starts = uniform if self._refiner.is_small else uniform[:1]
        refined = [self._refiner.refine(state) for state in starts]
        return self._finished(min(refined, key=lambda state: state.price.rank))

    def main_usd_per_s(self, plan: WholePlan) -> float:
        """H^w: what the main function costs a second under a plan of this demand."""
        return self.system.main_usd_per_s(plan.main, self.outlook.demand.tokens)

    def priced(
        self, counts: NDArray[np.intp], specs: NDArray[np.intp], replicas: NDArray[np.intp]
    ) -> WholePlan | None:
        """What given decisions take, or None where something does not fit.

        `counts` [layers] of those considered, `specs` [groups], `replicas` [layers].
        """
        index = np.searchsorted(self.outlook.counts, counts)
        needs = np.add.reduceat(counts, self._pricer.starts) > 0
        held = np.where(needs, self._pricer.held_gb(index), 0)
        if (held > self.system.remote.memory_gb[specs] + 1e-12).any():
            return None
        try:
            main = self._pricer.main_for(index)
        except ValueError:
            return None
        price = self._pricer.price(index, specs, replicas, main)
        return self._finished(State(index, specs, replicas, main, price))

    def _uniform(self, rule: RatioRule) -> list[State]:
        """One count for all layers, by the rule, and specs by knapsack; the best first."""
        indices = range(len(self.outlook.counts))
        if rule == "fixed":
            indices = indices[-1:]
        found: list[State] = []
        for index in reversed(indices):
            count = np.full(self.system.layers, index)
            try:
                main = self._pricer.main_for(count)
            except ValueError:
                continue
            state = self._settler.with_specs(count, main)
            if state is None:
                continue
            if rule == "largest":
                state = self._settler.settled(state)
                if state.price.excess <= 0:
                    return [state]
            found.append(state)
        if not found:
            raise ValueError(self._does_not_fit)
        return self._ranked(found)

    @property
    def _does_not_fit(self) -> str:
        return (
            "no partition fits: the main function's largest spec is "
            f"{self.system.main.memory_gb[-1]:.2f} GB, and the expert functions' "
            f"{self.system.remote.memory_gb[-1]:.2f} GB"
        )

    def _ranked(self, states: list[State]) -> list[State]:
        """Settled as far as that can change which is best, the best first.

        Replicas can save no more than a perfect split would, which bounds each state's cost.
        """
        least = {id(state): self._least_usd(state) for state in states}
        states = sorted(states, key=lambda state: least[id(state)])
        best = (np.inf, np.inf)
        experts = self.system.layers * self.system.experts
        tries = len(states) if experts <= _FEW_EXPERTS else _TRIES
        ranked = list[State]()
        for state in states:
            settled = state
            hopeful = state.price.excess <= 0 or self._replicas_may_mend(state)
            if tries > 0 and hopeful and (0.0, least[id(state)]) < best:
                settled = self._settler.settled(state)
                tries -= 1
            best = min(best, settled.price.rank)
            ranked.append(settled)
        return sorted(ranked, key=lambda state: state.price.rank)

    def _least_usd(self, state: State) -> float:
        usd_per_s = self.system.main_usd_per_s(state.main, self.outlook.demand.tokens)
        experts_s = (
            state.price.estimate.prefill_s - self._pricer.tables_for(state.main)[0].dense_prefill_s
        )
        spared = experts_s * (1 - 1 / self.system.max_replicas)
        return state.price.estimate.cost_usd - usd_per_s * spared

    def _replicas_may_mend(self, state: State) -> bool:
        """Whether the SLOs could hold if TTFT shrank as far as replicas ever let it."""
        most, total = self.system.max_replicas, state.price
        if total.tpot_s > self.limits.tpot_s * (1 + 1e-9):
            return False
        _, slow = self._pricer.tables_for(state.main)
        experts_s = total.ttft_s - slow.system.cold_start_s - slow.dense_prefill_s
        return total.ttft_s - experts_s * (1 - 1 / most) <= self.limits.ttft_s

    def _finished(self, state: State) -> WholePlan:
        counts = self.outlook.counts[state.count]
        remote = np.zeros((self.system.layers, self.system.experts), np.bool_)
        last = np.arange(self.system.experts) >= (self.system.experts - counts)[:, None]
        np.put_along_axis(remote, self.outlook.order, last, axis=1)
        return WholePlan(
            counts=counts,
            specs=state.spec[self._pricer.group],
            replicas=state.replicas,
            main=state.main,
            remote=remote,
            estimate=state.price.estimate,
            limit_ttft_s=state.price.ttft_s,
            limit_tpot_s=state.price.tpot_s,
            feasible=state.price.excess <= 0,
        )

    def fastest(self) -> tuple[float, float]:
        """The least TTFT and the least TPOT that any uniform plan reaches, each for itself."""
        ttft, tpot = [], []
        for index in range(len(self.outlook.counts)):
            count = np.full(self.system.layers, index)
            try:
                main = self._pricer.main_for(count)
            except ValueError:
                continue
            _, slow = self._pricer.tables_for(main)
            needs = self.outlook.counts[index] > 0
            fits = (
                self.system.remote.memory_gb + 1e-12 >= self._pricer.held_gb(count)[:, None]
            ) | ~needs
            if not fits.any(axis=1).all():
                continue
            fits = fits[self._pricer.group]  # [layers, specs]
            z = self.system.max_replicas if needs else 1
            prefill = slow.prefill_with(count, z)[0] if z > 1 else slow.prefill_s[:, index]
            prefill = np.minimum(prefill, slow.prefill_s[:, index])
            ttft.append(
                slow.system.cold_start_s
                + slow.dense_prefill_s
                + float(np.where(fits, prefill, np.inf).min(axis=1).sum())
            )
            step = np.where(fits, slow.step_s[:, index], np.inf).min(axis=1).sum()
            tpot.append(slow.dense_step_s + float(step))
        return min(ttft), min(tpot)
