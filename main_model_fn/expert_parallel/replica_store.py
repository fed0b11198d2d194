"""One rank's expert replicas of a layer, in slots, and how replicas move between ranks.

A replica is copied from a rank that holds one, beside the computing; whoever needs it waits for its
own transfers alone. All ranks keep the same book of who holds what, so none has to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from remoe.moeless.placement import Placement

__all__ = ["ExpertShape", "Move", "ReplicaStore", "SlotBook"]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A gated expert: its matrices are gate and up [2 x inner, hidden] and down [hidden, inner]."""

    hidden: int
    inner: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def matrices(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of gate and up, and of down, in one expert's weights [numel]."""
        cut = 2 * self.inner * self.hidden
        return (
            flat[:cut].view(2 * self.inner, self.hidden),
            flat[cut:].view(self.hidden, self.inner),
        )


@dataclass(frozen=True, slots=True)
class Move:
    """A replica to copy from one rank's slot to another rank's."""

    expert: int
    source: int
    source_slot: int
    target: int
    target_slot: int


class SlotBook:
    """Which expert lies in each slot of every rank. A replica that is no longer wanted stays in its
    slot, warm, until another needs the slot; an expert's last replica is never written over."""

    def __init__(self, placement: Placement, *, slots: int) -> None:
        self._held: list[list[int | None]] = []
        for rank in range(placement.gpus):
            held = sorted(set(placement.expert[placement.gpu == rank].tolist()))
            if len(held) > slots:
                raise ValueError(
                    f"{len(held)} experts do not fit the {slots} slots of rank {rank}; give more"
                )
            self._held.append([*held, *[None] * (slots - len(held))])

    def slot(self, rank: int, expert: int) -> int:
        return self._held[rank].index(expert)

    def held(self, rank: int) -> list[int]:
        """Experts with weights on a rank, served from there or not."""
        return sorted(expert for expert in self._held[rank] if expert is not None)

    @property
    def warm(self) -> Placement:
        """Every replica that could be served from without a transfer."""
        return _placed([{e for e in held if e is not None} for held in self._held])

    def change(self, wanted: Placement) -> tuple[Placement, list[Move]]:
        """Make room for `wanted`; what it comes to, and the copies it takes.

        Every expert must have a replica in it. Two replicas on one rank are one. A replica is left
        out where all slots are wanted or copied from just now; its expert is then served from where
        it is.
        """
        ranks = range(len(self._held))
        here = [set(wanted.expert[wanted.gpu == rank].tolist()) for rank in ranks]
        missing = [(rank, e) for rank in ranks for e in sorted(here[rank] - set(self.held(rank)))]
        sources = {expert: self._source(expert, here) for _, expert in missing}
        kept = [here[rank] | {e for e, s in sources.items() if s == rank} for rank in ranks]
        moves = []
        for rank, expert in missing:
            held, source = self._held[rank], sources[expert]
            free = [slot for slot, holds in enumerate(held) if holds not in kept[rank]]
            if not free:
                here[rank].discard(expert)
                if not any(expert in other for other in here):
                    here[source].add(expert)
                continue
            slot = min(free, key=lambda s: held[s] is not None)  # the empty ones first
            moves.append(Move(expert, source, self.slot(source, expert), rank, slot))
            held[slot] = expert
        return _placed(here), moves

    def _source(self, expert: int, wanted: list[set[int]]) -> int:
        """A rank that holds the expert: one that is to go on with it, if there is any."""
        holders = [rank for rank, held in enumerate(self._held) if expert in held]
        return min(holders, key=lambda rank: expert not in wanted[rank])


def _placed(by_rank: list[set[int]]) -> Placement:
    pairs = sorted((expert, rank) for rank, experts in enumerate(by_rank) for expert in experts)
    expert, rank = (np.array(column, np.intp) for column in zip(*pairs, strict=True))
    return Placement(expert, rank, len(by_rank))


class ReplicaStore:
    """Weights of one layer on this rank, and its `placement`. All ranks call it in the same order.

    `read` gives one expert's weights, [numel] on the device, for the first `placement`. `group` is
    for weights alone: they then wait for no rows.
    """

    def __init__(
        self,
        shape: ExpertShape,
        placement: Placement,
        *,
        slots: int,
        read: Callable[[int], torch.Tensor],
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        self.shape, self.placement = shape, placement
        self.book = SlotBook(placement, slots=slots)
        self._group = group
        self._rank = dist.get_rank(group)
        self._slots = [read(expert) for expert in self.book.held(self._rank)]
        empty = slots - len(self._slots)
        self._slots += [
            torch.empty(shape.numel, dtype=shape.dtype, device=device) for _ in range(empty)
        ]
        self._arriving: list[dist.Work] = []
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._last_use = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def slots(self) -> int:
        return len(self._slots)

    def change(self, wanted: Placement) -> int:
        """Serve by `wanted` from the next batch on; how many replicas that attaches, on all ranks.

        Returns without waiting for the transfers, on a GPU.
        """
        self.placement, moves = self.book.change(wanted)
        transfers = []
        for move in moves:
            if move.source == self._rank:
                weights = self._slots[move.source_slot]
                transfers.append(self._transfer(dist.isend, weights, move.target))
            elif move.target == self._rank:
                weights = self._slots[move.target_slot]
                transfers.append(self._transfer(dist.irecv, weights, move.source))
        if transfers:
            self._start(transfers)
        return len(moves)

    def _transfer(
        self, direction: Callable[..., object], weights: torch.Tensor, peer: int
    ) -> dist.P2POp:
        return dist.P2POp(direction, weights, dist.get_global_rank(self._group, peer), self._group)

    def _start(self, transfers: list[dist.P2POp]) -> None:
        if not self._cuda:
            self.arrived()  # what is copied on must be here; NCCL's own stream sees to that
            self._arriving = dist.batch_isend_irecv(transfers)
            return
        # On its own stream a transfer starts at once, not after the computing queued so far; it
        # only waits for the last batch that read the slots.
        self._stream.wait_event(self._last_use)
        with torch.cuda.stream(self._stream):
            self._arriving += dist.batch_isend_irecv(transfers)

    def arrived(self) -> None:
        """Make the computing to come wait for the transfers under way; on a CPU, the caller."""
        for work in self._arriving:
            work.wait()
        self._arriving = []

    def used(self) -> None:
        """Note that the computing queued so far reads the weights."""
        if self._cuda:
            self._last_use.record()

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, and down, of an expert that this rank serves."""
        return self.shape.matrices(self._slots[self.book.slot(self._rank, expert)])
