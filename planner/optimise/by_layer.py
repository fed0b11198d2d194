"""A count of remote experts for each layer, where the paper has one for all.

In turn, counts by layer for the specs found (a knapsack over TTFT, TPOT and the main function's
memory), and specs for those counts, as long as the cost falls. In small models also single changes
of one function's count, with everything else settled anew.

Ours, beyond papers.md A.10.
"""

from __future__ import annotations

import numpy as np

from planner.optimise.pricing import Pricer
from planner.optimise.settling import Settler, Solver, State

__all__ = ["LayerRefiner"]

_ROUNDS = 3
_SMALL = 100
"""Cells of the tables up to which single changes are all tried."""


class LayerRefiner:
    """Improves a configuration layer by layer."""

    def __init__(self, pricer: Pricer, settler: Settler, solver: Solver) -> None:
        self._pricer = pricer
        self._settler = settler
        self._solver = solver

    def refine(self, state: State) -> State:
        for _ in range(_ROUNDS):
            better = self._by_layer(state)
            if better.price.rank >= state.price.rank:
                break
            state = better
        return self._descend(state)

    def _by_layer(self, state: State) -> State:
        """Counts by layer for these specs, then specs for these counts."""
        counts, demand = self._pricer.outlook.counts, self._pricer.outlook.demand
        best = state
        need = self._pricer.need_gb(state.count)
        aims = {state.main}
        for share in (0.8, 0.9, 0.95, 1.05, 1.1, 1.25):
            aimed = np.searchsorted(self._pricer.system.main.memory_gb, share * need)
            aims.add(int(aimed.clip(0, len(self._pricer.system.main) - 1)))
        spec_of = state.spec[self._pricer.group]
        for main in sorted(aims):
            tables, slow = self._pricer.tables_for(main)
            usd_per_s = self._pricer.system.main_usd_per_s(main, demand.tokens)
            at = (self._pricer.layers[:, None], np.arange(len(counts)), spec_of[:, None])
            seconds = tables.prefill_s[at] + demand.decode_tokens * tables.step_s[at]
            usd = tables.prefill_usd[at] + demand.decode_tokens * tables.step_usd[at]
            cost = usd_per_s * seconds + usd  # [layers, counts]
            local_gb = (self._pricer.system.experts - counts) * self._pricer.system.expert_gb
            use = np.stack(
                [slow.prefill_s[at], slow.step_s[at], np.broadcast_to(local_gb, cost.shape)]
            )
            fixed_gb = self._pricer.system.main_need_gb(0, demand.tokens)
            memory_gb = float(self._pricer.system.main.memory_gb[main])
            budget = np.append(self._pricer.budgets(slow), memory_gb - fixed_gb)
            room = (
                self._pricer.system.remote.memory_gb[spec_of]
                - self._pricer.system.expert_runtime_gb
            )
            if self._pricer.system.granularity == "expert":
                one_gb = np.where(counts > 0, self._pricer.system.remote_expert_gb, 0)
                fits = one_gb <= room[:, None] + 1e-12
            else:
                held = (
                    counts
                    * self._pricer.system.remote_expert_gb
                    * self._pricer.sizes[self._pricer.group][:, None]
                )
                fits = held <= room[:, None] + 1e-12
            fits |= counts == 0
            picked = self._solver(np.where(fits, cost, np.inf), use, budget)
            try:
                actual = self._pricer.main_for(picked.option)
            except ValueError:
                continue
            again = self._settler.with_specs(picked.option, actual)
            if again is not None:
                again = self._settler.settled(again)
                if again.price.rank < best.price.rank:
                    best = again
        return best

    @property
    def is_small(self) -> bool:
        cells = (
            self._pricer.system.layers
            * len(self._pricer.outlook.counts)
            * len(self._pricer.system.remote)
        )
        return cells <= _SMALL

    def _descend(self, state: State) -> State:
        """Change one group's count, all specs settled anew, while the exact price falls."""
        improved = self.is_small
        while improved:
            improved = False
            for group, start in enumerate(self._pricer.starts):
                members = slice(start, start + self._pricer.sizes[group])
                for index in range(len(self._pricer.outlook.counts)):
                    count = state.count.copy()
                    count[members] = index
                    try:
                        main = self._pricer.main_for(count)
                    except ValueError:
                        continue
                    for replicas in (None, state.replicas):
                        changed = self._settler.with_specs(count, main, replicas)
                        if changed is None:
                            continue
                        changed = self._settler.settled(changed)
                        if changed.price.rank < state.price.rank:
                            state, improved = changed, True
        return state
