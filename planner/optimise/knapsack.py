"""One option for each group at least cost within budgets: the form of the memory problem (A.11).

On the grid of specs the paper's P1 is a multiple-choice knapsack. Its Lagrangian needs one
multiplier for each shared budget, not one for each layer as printed (papers.md D 10). For fixed
multipliers every group decides alone; bisection finds them, which also bounds the optimum from
below. What the bound leaves open is closed by exchanging options, and with one budget by merging
the few options whose reduced cost fits into the gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "choose"]

_TOLERANCE = 1e-9  # of a budget, against rounding of sums
_CLOSE_ENOUGH = 2e-4  # relative gap at which the search ends
_FRONT = 4096  # most partial choices kept while merging
_HALVINGS = 30
_CYCLES = 4
_PARTNERS = 512


@dataclass(frozen=True, slots=True)
class Choice:
    """`option[g]` is the option of group g; `bound` is below every feasible cost.

    If nothing is feasible, the options whose use exceeds the budgets least, relative to them.
    """

    option: NDArray[np.intp]
    cost: float
    feasible: bool
    bound: float
    multipliers: NDArray[np.float64]


def choose(
    cost: NDArray[np.float64], use: NDArray[np.float64], budget: NDArray[np.float64]
) -> Choice:
    """Minimise the sum of `cost` [groups, options] with the sums of `use` [budgets, groups, options]
    at most `budget` [budgets].

    An infinite cost forbids an option; every group needs one that is allowed. An infinite budget
    does not bind.
    """
    return _Problem(cost, use, budget).solve()


class _Problem:
    def __init__(
        self, cost: NDArray[np.float64], use: NDArray[np.float64], budget: NDArray[np.float64]
    ) -> None:
        self.cost = cost
        bind = np.isfinite(budget)
        self.use, self.budget = use[bind], budget[bind]
        self._bind = bind
        self._rows = np.arange(len(cost))
        # Budgets in units of themselves, so that one tolerance and one start fit all.
        self._scale = np.where(self.budget > 0, self.budget, 1.0)
        self.bound = -np.inf
        self.best: NDArray[np.intp] | None = None
        self.best_cost = np.inf
        self.multipliers = np.zeros(len(self.budget))
        self._bound_at = self.multipliers

    def solve(self) -> Choice:
        option = self._try(np.zeros(len(self.budget)))
        if not self._fits(option) and self._may_fit():
            self._bisect()
            if self.best is None:
                self._repair()
            if self.best is not None:
                self._exchange()
                if len(self.budget) == 1 and self._gap() > _CLOSE_ENOUGH:
                    self._merge()
        multipliers = np.zeros(len(self._bind))
        multipliers[self._bind] = self._bound_at
        if self.best is None:
            option = self._least_excess()
            return Choice(option, self._total(option), False, self.bound, multipliers)
        return Choice(self.best, self.best_cost, True, min(self.bound, self.best_cost), multipliers)

    def _may_fit(self) -> bool:
        """Whether each budget by itself can be met at all."""
        least = np.where(np.isfinite(self.cost), self.use, np.inf).min(axis=2).sum(axis=1)
        return bool(((least - self.budget) / self._scale <= _TOLERANCE).all())

    def _total(self, option: NDArray[np.intp]) -> float:
        return float(self.cost[self._rows, option].sum())

    def _used(self, option: NDArray[np.intp]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = self.use[:, self._rows, option].sum(axis=1)
        return result

    def _excess(self, option: NDArray[np.intp]) -> NDArray[np.float64]:
        """Use beyond each budget, in units of it; 0 or less is within."""
        result: NDArray[np.float64] = (self._used(option) - self.budget) / self._scale - _TOLERANCE
        return result

    def _fits(self, option: NDArray[np.intp]) -> bool:
        return bool((self._excess(option) <= 0).all())

    def _gap(self) -> float:
        return (self.best_cost - self.bound) / max(abs(self.best_cost), 1e-300)

    def _try(self, multipliers: NDArray[np.float64]) -> NDArray[np.intp]:
        """What every group chooses alone; remembers the bound and the best that fits."""
        value = self.cost + np.tensordot(multipliers, self.use, axes=1)
        option: NDArray[np.intp] = value.argmin(axis=1)
        bound = float(value[self._rows, option].sum() - multipliers @ self.budget)
        if bound > self.bound:
            self.bound, self._bound_at = bound, multipliers.copy()
        self._keep(option)
        return option

    def _keep(self, option: NDArray[np.intp]) -> None:
        total = self._total(option)
        if total < self.best_cost and self._fits(option):
            self.best, self.best_cost = option.copy(), total

    def _bisect(self) -> None:
        """Raise each multiplier until its budget just holds, in turn; they move each other."""
        allowed = self.cost[np.isfinite(self.cost)]
        start = max(float(np.abs(allowed).max()), 1e-300)
        multipliers = np.zeros(len(self.budget))
        for _ in range(1 if len(self.budget) == 1 else _CYCLES):
            before = multipliers.copy()
            for index, scale in enumerate(self._scale):
                multipliers[index] = self._root(multipliers, index, start / scale)
            if np.allclose(before, multipliers, rtol=1e-3):
                break

    def _root(self, multipliers: NDArray[np.float64], index: int, start: float) -> float:
        def holds(value: float) -> bool:
            multipliers[index] = value
            return bool(self._excess(self._try(multipliers))[index] <= 0)

        if holds(0.0):
            return 0.0
        low, high = start * 1e-12, start
        while not holds(high):
            if high > start * 1e12:
                return high
            low, high = high, high * 100
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if holds(middle) else (middle, high)
            if high < low * (1 + 1e-6) or (self.best is not None and self._gap() < 1e-7):
                break
        return high

    def _least_excess(self) -> NDArray[np.intp]:
        """Group by group the least use, all budgets weighed alike."""
        relative = (self.use / self._scale[:, None, None]).sum(axis=0)
        relative = np.where(np.isfinite(self.cost), relative, np.inf)
        # Of equal uses the cheapest.
        least = relative.min(axis=1, keepdims=True)
        cheapest: NDArray[np.intp] = np.where(
            relative <= least * (1 + 1e-12), self.cost, np.inf
        ).argmin(axis=1)
        return cheapest

    def _repair(self) -> None:
        """From the least use, single moves that lower the largest excess, until all fits."""
        option = self._least_excess()
        for _ in range(4 * len(self.cost)):
            excess = self._excess(option)
            if (excess <= 0).all():
                self._keep(option)
                return
            change = (self.use - self.use[:, self._rows, option][..., None]) / self._scale[
                :, None, None
            ]
            after = (excess[:, None, None] + change).clip(min=0).sum(axis=0)
            after = np.where(np.isfinite(self.cost), after, np.inf)
            group, to = np.unravel_index(int(after.argmin()), after.shape)
            if after[group, to] >= excess.clip(min=0).sum() - 1e-15:
                return
            option[group] = to

    def _exchange(self) -> None:
        """Move one group, or two at once, to other options while that saves cost and still fits."""
        assert self.best is not None  # noqa: S101  # called with a choice
        while True:
            option = self.best
            saving = self.cost[self._rows, option][:, None] - self.cost  # [groups, options]
            change = self.use - self.use[:, self._rows, option][..., None]
            room = self.budget * (1 + _TOLERANCE) - self._used(option)
            fits = (change <= room[:, None, None]).all(axis=0)
            single = np.where(fits, saving, -np.inf)
            group, to = np.unravel_index(int(single.argmax()), single.shape)
            moved = option.copy()
            if single[group, to] > 1e-12 * abs(self.best_cost):
                moved[group] = to
            elif not self._pair(moved, saving, change, room):
                return
            before = self.best_cost
            self._keep(moved)
            if self.best_cost >= before:
                return

    def _pair(
        self,
        option: NDArray[np.intp],
        saving: NDArray[np.float64],
        change: NDArray[np.float64],
        room: NDArray[np.float64],
    ) -> bool:
        """Apply to `option` the best pair of a move that saves and one that makes room for it."""
        groups, options = saving.shape
        flat, uses = saving.ravel(), change.reshape(len(room), -1)
        owner = np.repeat(np.arange(groups), options)
        gains = np.flatnonzero(flat > 0)
        gains = gains[np.argsort(-flat[gains])][:_PARTNERS]
        gives = np.flatnonzero(np.isfinite(flat) & (uses < 0).any(axis=0))
        gives = gives[np.argsort(-flat[gives])][: 2 * _PARTNERS]
        if len(gains) == 0 or len(gives) == 0:
            return False
        together = flat[gains][:, None] + flat[gives]  # [gains, gives]
        fits = owner[gains][:, None] != owner[gives]
        for use, left in zip(uses, room, strict=True):
            fits &= use[gains][:, None] + use[gives] <= left
        together[~fits] = -np.inf
        best = int(together.argmax())
        if together.flat[best] <= 1e-12 * abs(self.best_cost):
            return False
        for move in (gains[best // len(gives)], gives[best % len(gives)]):
            option[owner[move]] = move % options
        return True

    def _merge(self) -> None:
        """Group by group, all partial choices that could still beat the best (one budget only).

        An option whose reduced cost exceeds the gap is in no better choice; of the others, partial
        choices that use and cost more than another are dropped. Exact unless the front overflows.
        """
        multiplier = float(self._bound_at[0])
        value = self.cost + multiplier * self.use[0]
        reduced = value - value.min(axis=1, keepdims=True)
        gap = self.best_cost - self.bound
        used, spent, over = np.zeros(1), np.zeros(1), np.zeros(1)
        trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        for group in range(len(self.cost)):
            options = np.flatnonzero(reduced[group] < gap)
            total_over = (over[:, None] + reduced[group, options]).ravel()
            total_used = (used[:, None] + self.use[0, group, options]).ravel()
            total_spent = (spent[:, None] + self.cost[group, options]).ravel()
            kept = np.flatnonzero(total_over < gap)
            kept = kept[np.lexsort((total_spent[kept], total_used[kept]))]
            least = np.minimum.accumulate(total_spent[kept])
            first = np.ones(len(kept), np.bool_)
            first[1:] = least[1:] < least[:-1]
            kept = kept[first]
            if len(kept) > _FRONT:
                kept = np.sort(kept[np.argsort(total_over[kept])[:_FRONT]])
            if len(kept) == 0:
                return
            trail.append((kept // len(options), options[kept % len(options)]))
            used, spent, over = total_used[kept], total_spent[kept], total_over[kept]
        fitting = np.flatnonzero(used <= self.budget[0] + _TOLERANCE * self._scale[0])
        if len(fitting) == 0:
            return
        place = int(fitting[spent[fitting].argmin()])
        option = np.empty(len(self.cost), np.intp)
        for group in range(len(self.cost) - 1, -1, -1):
            parents, picks = trail[group]
            option[group] = picks[place]
            place = int(parents[place])
        self._keep(option)
