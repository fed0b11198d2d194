"""The best specs and replicas for given counts of remote experts (A.11 and A.12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.optimise.as_built import LayerTables
from planner.optimise.knapsack import Choice
from planner.optimise.pricing import Price, Pricer
from planner.optimise.replicas import grow_replicas

__all__ = ["Settler", "Solver", "State"]

Solver = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    Choice,
]
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class State:
    """A configuration, as in `Pricer`, and its price."""

    count: NDArray[np.intp]
    spec: NDArray[np.intp]
    replicas: NDArray[np.intp]
    main: int
    price: Price


class Settler:
    """Chooses specs by a knapsack solver, and replicas by what they save."""

    def __init__(self, pricer: Pricer, solver: Solver) -> None:
        self._pricer = pricer
        self._solver = solver

    def settled(self, state: State) -> State:
        """Replicas for these specs, and specs for those replicas, while that helps."""
        best = self._with_replicas(state)
        for _ in range(_ROUNDS):
            again = self.with_specs(best.count, best.main, best.replicas)
            if again is None or again.price.rank >= best.price.rank:
                break
            best = min(again, self._with_replicas(again), key=lambda state: state.price.rank)
        return best

    def with_specs(
        self, count: NDArray[np.intp], main: int, replicas: NDArray[np.intp] | None = None
    ) -> State | None:
        """The best specs for given counts and replicas (one each if none are given); None if a
        function would not fit."""
        if replicas is None:
            replicas = np.ones(self._pricer.system.layers, np.intp)
        tables, slow = self._pricer.tables_for(main)
        demand = self._pricer.outlook.demand
        usd_per_s = self._pricer.system.main_usd_per_s(main, demand.tokens)
        at = (self._pricer.layers, count)
        prefill_s, prefill_usd = self._pricer.prefill_by_spec(tables, count, replicas)
        late_s = prefill_s
        if slow is not tables:
            late_s = self._pricer.prefill_by_spec(slow, count, replicas)[0]
        seconds = prefill_s + demand.decode_tokens * tables.step_s[at]
        usd = prefill_usd + demand.decode_tokens * tables.step_usd[at]
        cost = np.add.reduceat(usd_per_s * seconds + usd, self._pricer.starts)  # [groups, specs]
        use = np.stack(
            [np.add.reduceat(part, self._pricer.starts) for part in (late_s, slow.step_s[at])]
        )
        needs = np.add.reduceat(self._pricer.outlook.counts[count], self._pricer.starts) > 0
        fits = self._pricer.system.remote.memory_gb + 1e-12 >= self._pricer.held_gb(count)[:, None]
        fits |= ~needs[:, None]  # no function, no limit
        if not fits.any(axis=1).all():
            return None
        picked = self._solver(np.where(fits, cost, np.inf), use, self._pricer.budgets(slow))
        spec = picked.option
        return State(count, spec, replicas, main, self._pricer.price(count, spec, replicas, main))

    def _with_replicas(self, state: State) -> State:
        """Replicas by what they save (A.12); the payload limit is met by more calls."""
        most = (
            1 if self._pricer.system.granularity == "expert" else self._pricer.system.max_replicas
        )
        tables, slow = self._pricer.tables_for(state.main)
        usd_per_s = self._pricer.system.main_usd_per_s(
            state.main, self._pricer.outlook.demand.tokens
        )
        if most == 1 or self._one_replica_is_best(state, tables, usd_per_s):
            return state
        layers, spec_of = self._pricer.layers, state.spec[self._pricer.group]
        cost, late = np.empty((most, len(layers))), np.empty((most, len(layers)))
        for more in range(most):
            seconds, usd = tables.prefill_with(state.count, more + 1)
            cost[more] = (usd_per_s * seconds + usd)[layers, spec_of]
            if slow is not tables:
                seconds = slow.prefill_with(state.count, more + 1)[0]
            late[more] = seconds[layers, spec_of]
        one = np.ones(len(layers), np.intp)
        replicas = grow_replicas(cost, late, one, float(self._pricer.budgets(slow)[0]))
        price = self._pricer.price(state.count, state.spec, replicas, state.main)
        return replace(state, replicas=replicas, price=price)

    def _one_replica_is_best(self, state: State, tables: LayerTables, usd_per_s: float) -> bool:
        """Whether even a perfect split of the longest prefill would not pay for an invocation."""
        if state.price.excess > 0:
            return False
        spec_of = state.spec[self._pricer.group]
        seconds, _ = tables.prefill_with(state.count, 1)
        overhead = tables.system.invocation_s if tables.system.billed_overhead else 0.0
        most_saved = usd_per_s * seconds[self._pricer.layers, spec_of]
        price = overhead * tables.system.remote.usd_per_s[spec_of]
        return bool((most_saved <= price).all())
