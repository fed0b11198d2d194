"""Time and cost as Remoe's functions really run: one call for a function, a layer and a step.

Against the paper's (3), (5), (8) and (9): a call carries each routed row once, whatever number of
its experts are remote there, and brings back one partial sum of it; a decode step pays one
invocation for a layer, not one for each remote expert; and a prompt whose rows exceed the payload
limit (10g) takes several calls (A.3, A.5, A.12, D 9). Everything is
an expectation over the predicted profiles, tabulated by how many experts of a layer are remote.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.optimise.replicas import lpt
from planner.optimise.system import System
from planner.remote_calls import call_chance_by_count

__all__ = ["Demand", "LayerTables", "Outlook", "remote_counts"]

_FINE = 16


@dataclass(frozen=True, slots=True)
class Demand:
    """One request's expected routes: shares of both phases, [layers with experts, experts]."""

    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]
    prompt_tokens: float
    decode_tokens: float

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.decode_tokens


def remote_counts(experts: int, most: int) -> NDArray[np.intp]:
    """The numbers of remote experts to consider, up to `most`: all of few, else 17 of many."""
    if experts <= _FINE:
        return np.arange(most + 1)
    steps = np.round(np.linspace(0, experts, _FINE + 1)).astype(np.intp)
    return np.unique(np.append(steps[steps <= most], most))


class Outlook:
    """What each layer will be asked, by how many of its experts are remote: the least used ones.

    Experts are ranked by u of A.10; among equals the lower index stays local. Arrays are
    [layers, counts] unless they say otherwise.
    """

    def __init__(
        self,
        system: System,
        demand: Demand,
        counts: NDArray[np.intp],
        remote: NDArray[np.bool_] | None = None,
    ) -> None:
        """With `remote`, [layers, experts], these are the last whatever their use."""
        self.demand = demand
        self.counts = counts
        use = demand.prompt_tokens * demand.prefill + demand.decode_tokens * demand.decode
        if remote is not None:
            use = np.where(remote, use - 1 - use.max(), use)
        self.order = np.argsort(-use, axis=1, kind="stable")  # [layers, experts]
        prefill = np.take_along_axis(demand.prefill, self.order, 1)
        decode = np.take_along_axis(demand.decode, self.order, 1)
        both = call_chance_by_count(np.concatenate([prefill, decode]), system.top_k, counts)
        self.prefill_chance, self.decode_chance = np.split(both, 2)
        self.decode_hits = system.top_k * _last(decode, counts)
        # Expected rows of each expert, in that order, and how their time adds up.
        self.rows = demand.prompt_tokens * system.top_k * prefill  # [layers, experts]
        self.basis = system.expert_times.basis(self.rows)  # [layers, experts, knots]
        self.remote_basis = _last(self.basis, counts)  # [layers, counts, knots]
        self.local_basis = self.basis.sum(axis=1)[:, None] - self.remote_basis
        self.distinct_rows = demand.prompt_tokens * self.prefill_chance
        self._owners: dict[tuple[bytes, int], NDArray[np.intp]] = {}
        # No prompt is so short that a fraction of a call helps.
        self.calls_in_prefill = (1 - (1 - self.prefill_chance) ** demand.prompt_tokens) * _calls(
            self.distinct_rows, system
        )

    def owners(self, count_index: NDArray[np.intp], replicas: int) -> NDArray[np.intp]:
        """The replica of each layer's experts by LPT on their rows, [layers, experts]; -1 where
        the expert is local. A row costs about the same on any spec, so one split serves all."""
        key = (count_index.tobytes(), replicas)
        if key not in self._owners:
            experts = self.rows.shape[1]
            remote = np.arange(experts) >= (experts - self.counts[count_index])[:, None]
            self._owners[key] = np.where(remote, lpt(np.where(remote, self.rows, 0), replicas), -1)
        return self._owners[key]


def _calls(rows: NDArray[np.float64], system: System) -> NDArray[np.float64]:
    """How many calls so many rows take, none of them beyond the payload limit."""
    result: NDArray[np.float64] = np.ceil(rows / system.rows_per_call).clip(min=1)
    return result


def _last(values: NDArray[np.float64], counts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sums of the last `counts` entries along axis 1."""
    totals = np.zeros((values.shape[0], values.shape[1] + 1, *values.shape[2:]))
    totals[:, 1:] = values[:, ::-1].cumsum(axis=1)
    result: NDArray[np.float64] = totals[:, counts]
    return result


@dataclass(frozen=True)
class LayerTables:
    """Seconds and USD of every layer by count of remote experts and spec of its function.

    [layers, counts, specs]. `prefill_s` and `step_s` are of the experts alone, moves included;
    `dense_*` the rest of the model. One replica; `prefill_with` has more.
    """

    system: System
    outlook: Outlook
    main_vcpus: float

    @cached_property
    def _one_local_s(self) -> float:
        return float(self.system.expert_times.seconds(np.ones(1), self.main_vcpus)[0])

    @cached_property
    def _one_remote_s(self) -> NDArray[np.float64]:
        basis = self.system.expert_times.basis(np.ones(1))
        result: NDArray[np.float64] = (basis @ self._knots_s)[0]
        return result  # [specs]

    @cached_property
    def _knots_s(self) -> NDArray[np.float64]:
        return self.system.expert_times.at(self.system.remote.vcpus)  # [knots, specs]

    @cached_property
    def _trip_s(self) -> float:
        """A row there and its sum back."""
        return 2 * self.system.token_bytes / self.system.bandwidth_bytes_per_s

    @property
    def dense_prefill_s(self) -> float:
        system = self.system
        return system.prefill_factor * system.non_expert_prefill_s(
            self.outlook.demand.prompt_tokens
        )

    @property
    def dense_step_s(self) -> float:
        return self.system.decode_factor * self.system.non_expert_step_s

    @cached_property
    def local_prefill_s(self) -> NDArray[np.float64]:
        """[layers, counts]"""
        knots_s = self.system.expert_times.at([self.main_vcpus])[:, 0]
        result: NDArray[np.float64] = self.outlook.local_basis @ knots_s
        return result

    @cached_property
    def step_s(self) -> NDArray[np.float64]:
        """One decoded token: its local experts beside the call, if there is one."""
        system, outlook = self.system, self.outlook
        chance = outlook.decode_chance[..., None]
        called = chance > 0
        hits = np.divide(
            outlook.decode_hits[..., None], chance, out=np.zeros_like(chance), where=called
        ).clip(max=system.top_k)
        one_after_another = 1.0 if system.granularity == "expert" else hits
        remote = system.invocation_s + self._trip_s + one_after_another * self._one_remote_s
        local = (system.top_k - hits) * self._one_local_s
        without = system.top_k * self._one_local_s
        experts = (1 - chance) * without + chance * np.maximum(local, remote)
        return system.decode_factor * (experts + 2 * system.move_s(1))

    @cached_property
    def step_usd(self) -> NDArray[np.float64]:
        system, outlook = self.system, self.outlook
        hits = outlook.decode_hits[..., None]
        calls = hits if system.granularity == "expert" else outlook.decode_chance[..., None]
        overhead = (system.invocation_s + self._trip_s) if system.billed_overhead else 0.0
        return (calls * overhead + hits * self._one_remote_s) * system.remote.usd_per_s

    @cached_property
    def prefill_s(self) -> NDArray[np.float64]:
        return self._prefill_s(self._remote_prefill_s, self.local_prefill_s[..., None])

    def _prefill_s(
        self, remote: NDArray[np.float64], local: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        system = self.system
        moves = 2 * system.move_s(self.outlook.demand.prompt_tokens)
        return system.prefill_factor * (np.maximum(local, remote) + moves)

    @cached_property
    def _remote_prefill_s(self) -> NDArray[np.float64]:
        system, outlook = self.system, self.outlook
        calls = outlook.calls_in_prefill[..., None]
        if system.granularity != "expert":
            moved = outlook.distinct_rows[..., None] * self._trip_s
            return calls * system.invocation_s + moved + outlook.remote_basis @ self._knots_s
        # All at once, so the layer waits for the most used of them.
        experts = outlook.rows.shape[1]
        first = (experts - outlook.counts).clip(max=experts - 1)
        longest = outlook.basis[:, first] @ self._knots_s
        longest = longest + outlook.rows[:, first, None] * self._trip_s
        return np.where(outlook.counts[None, :, None] > 0, longest, 0) + calls * system.invocation_s

    @cached_property
    def prefill_usd(self) -> NDArray[np.float64]:
        system, outlook = self.system, self.outlook
        computing = outlook.remote_basis @ self._knots_s
        if not system.billed_overhead:
            return computing * system.remote.usd_per_s
        if system.granularity == "expert":
            used = 1 - np.exp(-outlook.rows)
            calls, rows = _last(used, outlook.counts), _last(outlook.rows, outlook.counts)
        else:
            calls, rows = outlook.calls_in_prefill, outlook.distinct_rows
        overhead = calls * system.invocation_s + rows * self._trip_s
        return (computing + overhead[..., None]) * system.remote.usd_per_s

    def prefill_with(
        self, count_index: NDArray[np.intp], replicas: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Prefill seconds and USD, [layers, specs] each, if every layer's function has so many
        replicas, with its experts split by LPT."""
        system, outlook = self.system, self.outlook
        layers = np.arange(len(count_index))
        if replicas == 1 or system.granularity == "expert":
            return self.prefill_s[layers, count_index], self.prefill_usd[layers, count_index]
        owner = outlook.owners(count_index, replicas)
        longest = np.zeros((len(layers), len(system.remote)))
        usd = np.zeros_like(longest)
        n_in = outlook.demand.prompt_tokens
        for replica in range(replicas):
            mine = (owner == replica).astype(np.float64)  # [layers, experts]
            basis = (mine[:, None] @ outlook.basis)[:, 0]  # [layers, knots]
            share = (mine * outlook.rows).sum(axis=1) / max(n_in, 1e-300)  # experts a token
            # Routes to a replica's experts as independent draws: no token is sent twice.
            distinct = n_in * (1 - (1 - share / system.top_k).clip(0, 1) ** system.top_k)
            calls = (1 - np.exp(-distinct)) * _calls(distinct, system)
            overhead = calls * system.invocation_s + distinct * self._trip_s
            computing = basis @ self._knots_s
            longest = np.maximum(longest, computing + overhead[:, None])
            billed = computing + overhead[:, None] if system.billed_overhead else computing
            usd += billed * system.remote.usd_per_s
        local = self.local_prefill_s[layers, count_index][:, None]
        return self._prefill_s(longest, local), usd
