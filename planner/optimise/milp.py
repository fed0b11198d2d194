"""The same knapsack as an integer program, solved by HiGHS through cvxpy: oracle and option.

Needs the extra `planner-milp`; the planner's own solver does without.

See papers.md A.11.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.optimise.knapsack import Choice
from remoe.errors import SettingsError

__all__ = ["choose_by_milp"]


def choose_by_milp(
    cost: NDArray[np.float64],
    use: NDArray[np.float64],
    budget: NDArray[np.float64],
    *,
    time_limit_s: float = 60.0,
    gap: float = 1e-6,
) -> Choice:
    """Like `knapsack.choose`, to a relative `gap`; raises SettingsError without cvxpy."""
    try:
        import cvxpy as cp
    except ModuleNotFoundError as error:
        raise SettingsError(
            "the integer program needs cvxpy and HiGHS: `pip install 'remoe[planner-milp]'`, "
            "or choose the solver `lagrangian`"
        ) from error
    groups, options = cost.shape
    allowed = np.isfinite(cost)
    bind = np.flatnonzero(np.isfinite(budget))
    pick = cp.Variable((groups, options), boolean=True)
    # Costs near 1 keep the solver's absolute tolerances meaningful at fractions of a cent.
    scale = float(np.abs(cost[allowed]).max()) or 1.0
    constraints = [cp.sum(pick, axis=1) == 1]
    constraints += [
        cp.sum(cp.multiply(use[index] / (budget[index] or 1.0), pick))
        <= (1.0 if budget[index] else 0.0)
        for index in bind
    ]
    if not allowed.all():
        constraints.append(pick[~allowed] == 0)
    objective = cp.sum(cp.multiply(np.where(allowed, cost, 0) / scale, pick))
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.HIGHS, time_limit=time_limit_s, mip_rel_gap=gap)
    if pick.value is None:
        nothing = np.zeros(groups, np.intp)
        return Choice(nothing, np.inf, False, np.inf, np.zeros(len(budget)))
    option = pick.value.argmax(axis=1)
    total = float(cost[np.arange(groups), option].sum())
    # Solvers accept a constraint broken by their tolerance; ours is the knapsack's.
    used = use[:, np.arange(groups), option].sum(axis=1)
    feasible = bool((used[bind] <= budget[bind] * (1 + 1e-6)).all())
    return Choice(option, total, feasible, total * (1 - gap), np.zeros(len(budget)))
