"""Which experts there are, how a prompt uses them, and which of them are remote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["ActivationProfile", "ExpertId", "Partition"]


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One expert: its decoder layer and its index in that layer, both counted from 0."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"l{self.layer:02d}e{self.index:02d}"


@dataclass(frozen=True, slots=True)
class ActivationProfile:
    """How a prompt's routes spread over the experts of each layer (S̃ of Remoe, A.7.2).

    `shares` is float32 [layers, experts]; each row sums to 1, or is all zero for a dense layer.
    """

    shares: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.shares.ndim != 2:
            raise ValueError(f"a profile is [layers, experts], not {self.shares.shape}")
        rows = self.shares.sum(axis=1)
        if not np.all(np.isclose(rows, 1.0, atol=1e-3) | (rows == 0)):
            raise ValueError(f"every row of a profile sums to 1 (or is empty); got {rows}")

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> Self:
        """Normalise route counts [layers, experts]; a layer without routes stays all zero."""
        totals = counts.sum(axis=1, keepdims=True)  # [layers, 1]
        return cls((counts / np.maximum(totals, 1)).astype(np.float32))

    @property
    def layers(self) -> int:
        return int(self.shares.shape[0])

    @property
    def experts(self) -> int:
        return int(self.shares.shape[1])


class Partition(msgspec.Struct, frozen=True):
    """The remote experts of each layer: `remote[layer]` is a sorted tuple of expert indices.

    A dense layer has none; nothing here says which layers those are.
    """

    experts: int
    remote: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, indices in enumerate(self.remote):
            if list(indices) != sorted(set(indices)):
                raise ValueError(
                    f"layer {layer}: remote experts {indices} are not sorted and unique"
                )
            if indices and not 0 <= indices[0] <= indices[-1] < self.experts:
                raise ValueError(
                    f"layer {layer}: {indices} names an expert outside 0..{self.experts - 1}"
                )

    @classmethod
    def all_local(cls, layers: int, experts: int) -> Partition:
        """Every expert in the main-model function (the papers' MIX)."""
        return cls(experts=experts, remote=((),) * layers)

    @property
    def layers(self) -> int:
        return len(self.remote)

    @property
    def remote_count(self) -> int:
        return sum(len(indices) for indices in self.remote)

    def local(self, layer: int) -> tuple[int, ...]:
        """The resident experts of one layer."""
        remote = set(self.remote[layer])
        return tuple(index for index in range(self.experts) if index not in remote)

    def remote_ids(self) -> Iterator[ExpertId]:
        for layer, indices in enumerate(self.remote):
            for index in indices:
                yield ExpertId(layer, index)
