"""What each rank of a test runs, in a process of its own: one layer, whatever its placement."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from main_model_fn.expert_parallel.groups import open_groups
from main_model_fn.expert_parallel.layer import ExpertParallelLayer
from main_model_fn.expert_parallel.replica_store import ExpertShape, ReplicaStore
from remoe.moeless.baselines import expert_parallel
from remoe.moeless.placement import Placement

_EXPERTS, _TOP_K, _SLOTS = 8, 2, 6


def run_checks(rank: int, ranks: int, address: str, dtype: torch.dtype) -> None:
    """Raises AssertionError in the rank that sees something wrong."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=90)
    )
    device = torch.device("cpu")
    rows, weights = open_groups(device)
    layer = _Layer(ExpertShape(16, 24, dtype), rows, weights)
    home = layer.home
    batches = [3, 40, 7, 1]

    layer.check([batches[r % 4] for r in range(ranks)])
    layer.check([0] * (ranks - 1) + [25])  # one rank alone has tokens
    layer.check([0] * ranks)

    # The hot expert everywhere: its rows are shared evenly.
    everywhere = [(0, r) for r in range(ranks)]
    layer.change(everywhere + [(e, r) for e, r in home if e])
    layer.check([24] * ranks, only=0)
    assert layer.layer.loads.ranks.max() - layer.layer.loads.ranks.min() <= 1
    assert layer.layer.loads.experts.tolist() == [24 * ranks] + [0] * (_EXPERTS - 1)

    # Replicas that never were at home are computed with weights that came from other ranks.
    random = np.random.default_rng(5)  # the same on every rank
    attached = 0
    for _ in range(8):
        wanted = [
            (e, int(r))
            for e in range(_EXPERTS)
            for r in random.choice(ranks, random.integers(1, ranks + 1), replace=False)
        ]
        attached += layer.change(wanted)
        layer.check([batches[(r + attached) % 4] for r in range(ranks)])
    assert attached > _EXPERTS

    announced = torch.full((_EXPERTS,), rank + 1)
    layer.check([2] * ranks, ahead=announced)
    assert layer.layer.loads.ahead.tolist() == [ranks * (ranks + 1) // 2] * _EXPERTS
    dist.destroy_process_group()


class _Layer:
    """A layer beside its dense reference."""

    def __init__(
        self, shape: ExpertShape, rows: dist.ProcessGroup, weights: dist.ProcessGroup
    ) -> None:
        self._shape = shape
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        placement = expert_parallel(_EXPERTS, self._ranks)
        self.home = list(zip(placement.expert.tolist(), placement.gpu.tolist(), strict=True))
        store = ReplicaStore(
            shape,
            placement,
            slots=_SLOTS,
            read=self._read,
            device=torch.device("cpu"),
            group=weights,
        )
        self.layer = ExpertParallelLayer(store, experts=_EXPERTS, group=rows)
        self._generator = torch.Generator().manual_seed(self._rank)

    def _read(self, expert: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + expert)
        return (torch.randn(self._shape.numel, generator=generator) / 4).to(self._shape.dtype)

    def change(self, pairs: list[tuple[int, int]]) -> int:
        expert, rank = (np.array(column, np.intp) for column in zip(*pairs, strict=True))
        return self.layer.store.change(Placement.of(expert, rank, self._ranks))

    def check(
        self, tokens: list[int], *, only: int | None = None, ahead: torch.Tensor | None = None
    ) -> None:
        """Compare with every expert computed here; with `only`, one route a token, to that one."""
        count = tokens[self._rank]
        hidden = torch.randn(count, self._shape.hidden, generator=self._generator)
        hidden = hidden.to(self._shape.dtype)
        scores = torch.rand(count, _EXPERTS, generator=self._generator)
        gates, index = scores.topk(_TOP_K if only is None else 1, dim=-1)
        if only is not None:
            index = torch.full_like(index, only)
        out = self.layer.forward(hidden, index, gates, ahead=ahead)
        expected = torch.zeros(count, self._shape.hidden)
        for expert in range(_EXPERTS):
            token, slot = (index == expert).nonzero(as_tuple=True)
            gate_up, down = self._shape.matrices(self._read(expert).float())
            gate, up = (hidden[token].float() @ gate_up.T).chunk(2, dim=-1)
            one = (functional.silu(gate) * up) @ down.T
            expected.index_add_(0, token, one * gates[token, slot, None])
        tolerance = 1e-5 if self._shape.dtype == torch.float32 else 2e-2
        assert out.shape == hidden.shape
        assert out.dtype == hidden.dtype
        assert (out.float() - expected).norm() <= tolerance * expected.norm()
