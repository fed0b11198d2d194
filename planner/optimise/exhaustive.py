"""Every configuration of a tiny model, priced: the oracle for whole plans (10).

See papers.md A.5.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from planner.optimise.whole_plan import WholePlan, WholePlanner

__all__ = ["best_of_all"]


def best_of_all(planner: WholePlanner, *, uniform: bool = False) -> WholePlan | None:
    """The cheapest feasible plan over counts, specs and replicas jointly; None if none is.

    With `uniform` all layers have one count, as in the paper. Time grows as
    (counts x specs x replicas) to the power of layers.
    """
    system, counts = planner.system, planner.outlook.counts
    layers, groups = system.layers, len(system.group_starts)
    best: WholePlan | None = None
    all_counts = (
        [(count,) * layers for count in counts] if uniform else product(counts, repeat=layers)
    )
    for chosen in all_counts:
        for specs in product(range(len(system.remote)), repeat=groups):
            for replicas in product(range(1, system.max_replicas + 1), repeat=layers):
                plan = planner.priced(np.array(chosen), np.array(specs), np.array(replicas))
                if plan is None or not plan.feasible:
                    continue
                if best is None or plan.estimate.cost_usd < best.estimate.cost_usd:
                    best = plan
    return best
