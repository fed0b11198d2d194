"""One MoE layer over all ranks: dispatch rows to replicas, compute, combine (papers.md B.1, B.2).

Each rank brings its own tokens, which may be none. Every route is computed by the expert that the
router chose, so the result is the layer's own, whatever the placement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional

from main_model_fn.expert_parallel.replica_store import ReplicaStore
from main_model_fn.expert_parallel.route_flow import route_flow
from main_model_fn.expert_parallel.segments import reordered

__all__ = ["ExpertParallelLayer", "LayerLoads"]


@dataclass(frozen=True, slots=True)
class LayerLoads:
    """What a batch asked of a layer, over all ranks: routes of each expert, and on each rank.

    `ahead` is the sum of what the ranks announced of a later layer, [experts].
    """

    experts: NDArray[np.intp]
    ranks: NDArray[np.intp]
    ahead: NDArray[np.intp]


class ExpertParallelLayer:
    """All ranks call `forward` in the same order. `group` is for rows alone."""

    def __init__(self, store: ReplicaStore, *, experts: int, group: dist.ProcessGroup) -> None:
        self.store = store
        self._experts = experts
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self.loads = LayerLoads(*(np.zeros(0, np.intp) for _ in range(3)))

    def forward(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum over the routed experts, [tokens, hidden], of this rank's tokens.

        `hidden` [tokens, hidden]; `top_k_index` int64 and `top_k_weights` [tokens, top_k].
        `ahead`, int64 [experts], are the loads this rank predicts for a later layer: they travel
        with this layer's counts, for nothing, and their sum is in `loads` afterwards.
        """
        tokens, top_k = top_k_index.shape
        chosen = top_k_index.reshape(-1)  # [routes]
        counts, announced = self._gather_counts(chosen, ahead)
        placement = self.store.placement
        flow = route_flow(counts, placement)  # [ranks, replicas]
        per_rank = np.zeros((self._ranks, self._ranks), np.intp)  # [from, to]
        np.add.at(per_rank.T, placement.gpu, flow.T)
        self.loads = LayerLoads(counts.sum(0), per_rank.sum(0), announced)

        # Routes sorted by expert are in the replicas' order; they leave in the ranks' order.
        by_expert = torch.argsort(chosen, stable=True)
        leaving = by_expert[
            reordered(flow[self._rank], np.argsort(placement.gpu, kind="stable"), hidden.device)
        ]
        sent = per_rank[self._rank].tolist()
        received = per_rank[:, self._rank].tolist()
        rows = self._exchange(hidden[leaving // top_k], sent, received)

        # Rows come rank by rank, each in the order of the replicas here; experts want them together.
        here = np.flatnonzero(placement.gpu == self._rank)
        arrived = flow[:, here]  # [ranks, replicas here]
        grid = np.arange(arrived.size).reshape(arrived.shape)
        together = reordered(arrived.ravel(), grid.T.ravel(), hidden.device)
        self.store.arrived()
        out = self._compute(rows[together], placement.expert[here], arrived.sum(0))
        self.store.used()
        back = torch.empty_like(out)
        back[together] = out

        routes = torch.empty(
            tokens * top_k, hidden.shape[1], dtype=hidden.dtype, device=hidden.device
        )
        routes[leaving] = self._exchange(back, received, sent)
        weighted = (
            routes.view(tokens, top_k, hidden.shape[1]) * top_k_weights.to(hidden.dtype)[..., None]
        )
        return weighted.sum(1)

    def _gather_counts(
        self, chosen: torch.Tensor, ahead: torch.Tensor | None
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Every rank's routes by expert [ranks, experts], and the sum of what they announce."""
        own = torch.bincount(chosen, minlength=self._experts)
        both = torch.stack([own, torch.zeros_like(own) if ahead is None else ahead])
        gathered = both.new_empty(self._ranks, 2, self._experts)
        dist.all_gather(list(gathered.unbind()), both, group=self._group)
        table = gathered.cpu().numpy()
        return table[:, 0].astype(np.intp), table[:, 1].sum(0).astype(np.intp)

    def _exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """All-to-all: `sent` rows to each rank, in order, for `received` from each."""
        arrived = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self._group)
        return arrived

    def _compute(
        self, rows: torch.Tensor, experts: NDArray[np.intp], sizes: NDArray[np.intp]
    ) -> torch.Tensor:
        """Each expert on its rows, which lie one expert after another: [rows, hidden]."""
        out = torch.empty_like(rows)
        end = 0
        for expert, size in zip(experts.tolist(), sizes.tolist(), strict=True):
            if size:
                part = slice(end, end + size)
                gate_up, down = self.store.weights(expert)
                gate, up = functional.linear(rows[part], gate_up).chunk(2, dim=-1)
                torch.mm(functional.silu(gate) * up, down.T, out=out[part])
                end += size
        return out
