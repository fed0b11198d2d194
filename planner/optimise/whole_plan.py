"""The whole plan of (10): which experts are remote, with how much memory and how many replicas.

The paper takes the largest ratio b that holds the SLOs, the same for all layers, and then
optimises memory and replicas (A.9 to A.12). Here b is the one whose predicted cost is least among
those that hold, and may then differ from layer to layer. Steps, each a small exact problem:

1. For every uniform count of remote experts, specs by the knapsack of A.11; keep the cheapest.
2. In turn, counts by layer for the specs found (a knapsack over TTFT, TPOT and the main function's
   memory), and specs for those counts, as long as the cost falls.
3. Replicas greedily (A.12), and specs again for those.
4. In small models, single changes of one function's count, with everything else settled anew.

Costs are means. Limits are checked with the tables of a slower system where one is given, which is
how plans are made robust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.optimise.as_built import Demand, LayerTables, Outlook, remote_counts
from planner.optimise.knapsack import Choice, choose
from planner.optimise.paper_model import Estimate
from planner.optimise.replicas import grow_replicas
from planner.optimise.system import System

__all__ = ["Limits", "RatioRule", "Solver", "WholePlan", "WholePlanner"]

RatioRule = Literal["fixed", "largest", "cost", "per-layer"]
Solver = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    Choice,
]
_ROUNDS = 3
_TRIES = 3
_FEW_EXPERTS = 128  # up to so many, splits among replicas cost nothing to try


@dataclass(frozen=True, slots=True)
class Limits:
    """SLOs; infinite where there is none."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")


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


@dataclass(slots=True)
class _State:
    count: NDArray[np.intp]  # index into outlook.counts, [layers]
    spec: NDArray[np.intp]  # [groups]
    replicas: NDArray[np.intp]  # [layers]
    main: int
    total: _Total


@dataclass(frozen=True, slots=True)
class _Total:
    estimate: Estimate
    ttft_s: float
    tpot_s: float
    excess: float

    @property
    def rank(self) -> tuple[float, float]:
        """Feasible first, then cheap; what is not feasible by how far it is off."""
        return (self.excess, self.estimate.cost_usd)


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
        self._slow = slow
        self._solver = solver
        self._starts = system.group_starts
        self._sizes = np.diff(np.append(self._starts, system.layers))
        self._group = np.repeat(np.arange(len(self._starts)), self._sizes)  # [layers]
        self._layers = np.arange(system.layers)
        self._tables: dict[float, tuple[LayerTables, LayerTables]] = {}

    def plan(self, rule: RatioRule = "cost") -> WholePlan:
        """The best plan by a rule for b; with `fixed` the largest count there is.

        ValueError if the functions' largest specs hold no partition.
        """
        if self._remote is not None:
            index = np.searchsorted(self.outlook.counts, self._remote.sum(axis=1))
            state = self._with_specs(index, self._main(index))
            if state is None:
                raise ValueError(self._does_not_fit)
            return self._finished(self._settled(state))
        uniform = self._uniform(rule)
        if rule != "per-layer":
            return self._finished(uniform[0])
        starts = uniform if self._is_small else uniform[:1]
        refined = [self._refine(state) for state in starts]
        return self._finished(min(refined, key=lambda state: state.total.rank))

    def priced(
        self, counts: NDArray[np.intp], specs: NDArray[np.intp], replicas: NDArray[np.intp]
    ) -> WholePlan | None:
        """What given decisions take, or None where something does not fit.

        `counts` [layers] of those considered, `specs` [groups], `replicas` [layers].
        """
        index = np.searchsorted(self.outlook.counts, counts)
        needs = np.add.reduceat(counts, self._starts) > 0
        held = np.where(needs, self._held_gb(index), 0)
        if (held > self.system.remote.memory_gb[specs] + 1e-12).any():
            return None
        try:
            main = self._main(index)
        except ValueError:
            return None
        total = self._total(index, specs, replicas, main)
        return self._finished(_State(index, specs, replicas, main, total))

    # How things are counted

    def _need_gb(self, count: NDArray[np.intp]) -> float:
        local = self.system.layers * self.system.experts - float(self.outlook.counts[count].sum())
        return self.system.main_need_gb(local, self.outlook.demand.tokens)

    def _main(self, count: NDArray[np.intp]) -> int:
        return self.system.main.smallest(max(self._need_gb(count), self.system.main_least_gb))

    def _tables_for(self, main: int) -> tuple[LayerTables, LayerTables]:
        """Mean and slow tables for the main function's vCPUs."""
        vcpus = float(self.system.main.vcpus[main])
        if vcpus not in self._tables:
            mean = LayerTables(self.system, self.outlook, vcpus)
            slow = mean if self._slow is None else LayerTables(self._slow, self.outlook, vcpus)
            self._tables[vcpus] = (mean, slow)
        return self._tables[vcpus]

    def _held_gb(self, count: NDArray[np.intp]) -> NDArray[np.float64]:
        """What each group's function must hold, [groups] (10e)."""
        system = self.system
        experts = self.outlook.counts[count].astype(np.float64)
        if system.granularity == "expert":
            held = np.minimum(1, experts) * system.remote_expert_gb
        else:
            held = np.add.reduceat(experts, self._starts) * system.remote_expert_gb
        return held + system.expert_runtime_gb

    def _budgets(self, tables: LayerTables) -> NDArray[np.float64]:
        """Seconds left to the experts for TTFT and for a token."""
        system = tables.system
        return np.array(
            [
                self.limits.ttft_s - system.cold_start_s - tables.dense_prefill_s,
                self.limits.tpot_s - tables.dense_step_s,
            ]
        )

    def _total(
        self,
        count: NDArray[np.intp],
        spec: NDArray[np.intp],
        replicas: NDArray[np.intp],
        main: int,
    ) -> _Total:
        """Price one configuration, exactly by the tables."""
        tables, slow = self._tables_for(main)
        demand = self.outlook.demand
        spec_of = spec[self._group]
        cell = (self._layers, count, spec_of)
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
        return _Total(estimate, ttft_s, tpot_s, over)

    def _largest_payload_bytes(self, count: NDArray[np.intp]) -> float:
        rows = float(self.outlook.distinct_rows[self._layers, count].max(initial=0))
        return min(rows, self.system.rows_per_call) * self.system.token_bytes

    def _prefill_of(
        self,
        tables: LayerTables,
        count: NDArray[np.intp],
        spec_of: NDArray[np.intp],
        replicas: NDArray[np.intp],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds and USD of every layer's prefill with its own spec and replicas, [layers]."""
        seconds, usd = self._prefill_by_spec(tables, count, replicas)
        return seconds[self._layers, spec_of], usd[self._layers, spec_of]

    def _prefill_by_spec(
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

    # Searching

    def _uniform(self, rule: RatioRule) -> list[_State]:
        """One count for all layers, by the rule, and specs by knapsack; the best first."""
        indices = range(len(self.outlook.counts))
        if rule == "fixed":
            indices = indices[-1:]
        found: list[_State] = []
        for index in reversed(indices):
            count = np.full(self.system.layers, index)
            try:
                main = self._main(count)
            except ValueError:
                continue
            state = self._with_specs(count, main)
            if state is None:
                continue
            if rule == "largest":
                state = self._settled(state)
                if state.total.excess <= 0:
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

    def _ranked(self, states: list[_State]) -> list[_State]:
        """Settled as far as that can change which is best, the best first.

        Replicas can save no more than a perfect split would, which bounds each state's cost.
        """
        least = {id(state): self._least_usd(state) for state in states}
        states = sorted(states, key=lambda state: least[id(state)])
        best = (np.inf, np.inf)
        experts = self.system.layers * self.system.experts
        tries = len(states) if experts <= _FEW_EXPERTS else _TRIES
        ranked = list[_State]()
        for state in states:
            settled = state
            hopeful = state.total.excess <= 0 or self._replicas_may_mend(state)
            if tries > 0 and hopeful and (0.0, least[id(state)]) < best:
                settled = self._settled(state)
                tries -= 1
            best = min(best, settled.total.rank)
            ranked.append(settled)
        return sorted(ranked, key=lambda state: state.total.rank)

    def _least_usd(self, state: _State) -> float:
        usd_per_s = self.system.main_usd_per_s(state.main, self.outlook.demand.tokens)
        experts_s = state.total.estimate.prefill_s - self._tables_for(state.main)[0].dense_prefill_s
        spared = experts_s * (1 - 1 / self.system.max_replicas)
        return state.total.estimate.cost_usd - usd_per_s * spared

    def _replicas_may_mend(self, state: _State) -> bool:
        """Whether the SLOs could hold if TTFT shrank as far as replicas ever let it."""
        most, total = self.system.max_replicas, state.total
        if total.tpot_s > self.limits.tpot_s * (1 + 1e-9):
            return False
        _, slow = self._tables_for(state.main)
        experts_s = total.ttft_s - slow.system.cold_start_s - slow.dense_prefill_s
        return total.ttft_s - experts_s * (1 - 1 / most) <= self.limits.ttft_s

    def _settled(self, state: _State) -> _State:
        """Replicas for these specs, and specs for those replicas, while that helps."""
        best = self._with_replicas(state)
        for _ in range(_ROUNDS):
            again = self._with_specs(best.count, best.main, best.replicas)
            if again is None or again.total.rank >= best.total.rank:
                break
            best = min(again, self._with_replicas(again), key=lambda state: state.total.rank)
        return best

    def _with_specs(
        self, count: NDArray[np.intp], main: int, replicas: NDArray[np.intp] | None = None
    ) -> _State | None:
        """The best specs for given counts and replicas (one each if none are given); None if a
        function would not fit."""
        if replicas is None:
            replicas = np.ones(self.system.layers, np.intp)
        tables, slow = self._tables_for(main)
        demand = self.outlook.demand
        usd_per_s = self.system.main_usd_per_s(main, demand.tokens)
        at = (self._layers, count)
        prefill_s, prefill_usd = self._prefill_by_spec(tables, count, replicas)
        late_s = prefill_s
        if slow is not tables:
            late_s = self._prefill_by_spec(slow, count, replicas)[0]
        seconds = prefill_s + demand.decode_tokens * tables.step_s[at]
        usd = prefill_usd + demand.decode_tokens * tables.step_usd[at]
        cost = np.add.reduceat(usd_per_s * seconds + usd, self._starts)  # [groups, specs]
        use = np.stack([np.add.reduceat(part, self._starts) for part in (late_s, slow.step_s[at])])
        needs = np.add.reduceat(self.outlook.counts[count], self._starts) > 0
        fits = self.system.remote.memory_gb + 1e-12 >= self._held_gb(count)[:, None]
        fits |= ~needs[:, None]  # no function, no limit
        if not fits.any(axis=1).all():
            return None
        picked = self._solver(np.where(fits, cost, np.inf), use, self._budgets(slow))
        spec = picked.option
        return _State(count, spec, replicas, main, self._total(count, spec, replicas, main))

    def _with_replicas(self, state: _State) -> _State:
        """Replicas by what they save (A.12); the payload limit is met by more calls."""
        most = 1 if self.system.granularity == "expert" else self.system.max_replicas
        tables, slow = self._tables_for(state.main)
        usd_per_s = self.system.main_usd_per_s(state.main, self.outlook.demand.tokens)
        if most == 1 or self._one_replica_is_best(state, tables, usd_per_s):
            return state
        layers, spec_of = self._layers, state.spec[self._group]
        cost, late = np.empty((most, len(layers))), np.empty((most, len(layers)))
        for more in range(most):
            seconds, usd = tables.prefill_with(state.count, more + 1)
            cost[more] = (usd_per_s * seconds + usd)[layers, spec_of]
            if slow is not tables:
                seconds = slow.prefill_with(state.count, more + 1)[0]
            late[more] = seconds[layers, spec_of]
        one = np.ones(len(layers), np.intp)
        replicas = grow_replicas(cost, late, one, float(self._budgets(slow)[0]))
        total = self._total(state.count, state.spec, replicas, state.main)
        return replace(state, replicas=replicas, total=total)

    def _one_replica_is_best(self, state: _State, tables: LayerTables, usd_per_s: float) -> bool:
        """Whether even a perfect split of the longest prefill would not pay for an invocation."""
        if state.total.excess > 0:
            return False
        spec_of = state.spec[self._group]
        seconds, _ = tables.prefill_with(state.count, 1)
        overhead = tables.system.invocation_s if tables.system.billed_overhead else 0.0
        most_saved = usd_per_s * seconds[self._layers, spec_of]
        price = overhead * tables.system.remote.usd_per_s[spec_of]
        return bool((most_saved <= price).all())

    def _refine(self, state: _State) -> _State:
        for _ in range(_ROUNDS):
            better = self._by_layer(state)
            if better.total.rank >= state.total.rank:
                break
            state = better
        return self._descend(state)

    def _by_layer(self, state: _State) -> _State:
        """Counts by layer for these specs, then specs for these counts."""
        counts, demand = self.outlook.counts, self.outlook.demand
        best = state
        need = self._need_gb(state.count)
        aims = {state.main}
        for share in (0.8, 0.9, 0.95, 1.05, 1.1, 1.25):
            aimed = np.searchsorted(self.system.main.memory_gb, share * need)
            aims.add(int(aimed.clip(0, len(self.system.main) - 1)))
        spec_of = state.spec[self._group]
        for main in sorted(aims):
            tables, slow = self._tables_for(main)
            usd_per_s = self.system.main_usd_per_s(main, demand.tokens)
            at = (self._layers[:, None], np.arange(len(counts)), spec_of[:, None])
            seconds = tables.prefill_s[at] + demand.decode_tokens * tables.step_s[at]
            usd = tables.prefill_usd[at] + demand.decode_tokens * tables.step_usd[at]
            cost = usd_per_s * seconds + usd  # [layers, counts]
            local_gb = (self.system.experts - counts) * self.system.expert_gb
            use = np.stack(
                [slow.prefill_s[at], slow.step_s[at], np.broadcast_to(local_gb, cost.shape)]
            )
            fixed_gb = self.system.main_need_gb(0, demand.tokens)
            memory_gb = float(self.system.main.memory_gb[main])
            budget = np.append(self._budgets(slow), memory_gb - fixed_gb)
            room = self.system.remote.memory_gb[spec_of] - self.system.expert_runtime_gb
            if self.system.granularity == "expert":
                one_gb = np.where(counts > 0, self.system.remote_expert_gb, 0)
                fits = one_gb <= room[:, None] + 1e-12
            else:
                held = counts * self.system.remote_expert_gb * self._sizes[self._group][:, None]
                fits = held <= room[:, None] + 1e-12
            fits |= counts == 0
            picked = self._solver(np.where(fits, cost, np.inf), use, budget)
            try:
                actual = self._main(picked.option)
            except ValueError:
                continue
            again = self._with_specs(picked.option, actual)
            if again is not None:
                again = self._settled(again)
                if again.total.rank < best.total.rank:
                    best = again
        return best

    @property
    def _is_small(self) -> bool:
        cells = self.system.layers * len(self.outlook.counts) * len(self.system.remote)
        return cells <= _SMALL

    def _descend(self, state: _State) -> _State:
        """Change one group's count, all specs settled anew, while the exact price falls."""
        improved = self._is_small
        while improved:
            improved = False
            for group, start in enumerate(self._starts):
                members = slice(start, start + self._sizes[group])
                for index in range(len(self.outlook.counts)):
                    count = state.count.copy()
                    count[members] = index
                    try:
                        main = self._main(count)
                    except ValueError:
                        continue
                    for replicas in (None, state.replicas):
                        changed = self._with_specs(count, main, replicas)
                        if changed is None:
                            continue
                        changed = self._settled(changed)
                        if changed.total.rank < state.total.rank:
                            state, improved = changed, True
        return state

    def _finished(self, state: _State) -> WholePlan:
        counts = self.outlook.counts[state.count]
        remote = np.zeros((self.system.layers, self.system.experts), np.bool_)
        last = np.arange(self.system.experts) >= (self.system.experts - counts)[:, None]
        np.put_along_axis(remote, self.outlook.order, last, axis=1)
        return WholePlan(
            counts=counts,
            specs=state.spec[self._group],
            replicas=state.replicas,
            main=state.main,
            remote=remote,
            estimate=state.total.estimate,
            limit_ttft_s=state.total.ttft_s,
            limit_tpot_s=state.total.tpot_s,
            feasible=state.total.excess <= 0,
        )

    def fastest(self) -> tuple[float, float]:
        """The least TTFT and the least TPOT that any uniform plan reaches, each for itself."""
        ttft, tpot = [], []
        for index in range(len(self.outlook.counts)):
            count = np.full(self.system.layers, index)
            try:
                main = self._main(count)
            except ValueError:
                continue
            _, slow = self._tables_for(main)
            needs = self.outlook.counts[index] > 0
            fits = (self.system.remote.memory_gb + 1e-12 >= self._held_gb(count)[:, None]) | ~needs
            if not fits.any(axis=1).all():
                continue
            fits = fits[self._group]  # [layers, specs]
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


_SMALL = 100
"""Cells of the tables up to which single changes are all tried."""
