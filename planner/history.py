"""Prompts seen before: their vectors, what they activated, and how often they came.

Held in memory, bounded and de-duplicated; it is lost with the process, apart from the shipped
entries, which are read again at the next start. Not thread-safe: one thread at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.phases import PhaseProfiles, normalise_rows
from remoe.experts import ActivationProfile

__all__ = ["OBSERVED_TOPIC", "History", "HistoryEntries"]

OBSERVED_TOPIC = "observed"
# Prompts of equal length and direction are one prompt to every predictor built on the vector;
# float16 storage moves a cosine by less than this.
_SAME_PROMPT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntries:
    """Checked contents of a history file, in its order; `topic` indexes `topics`."""

    vectors: NDArray[np.float32]  # [n, hidden], unit length
    profiles: NDArray[np.float32]  # [n, layers, experts], rows sum to 1 or are zero: prefill
    decode_profiles: NDArray[np.float32] | None  # the same of decode; None where it is not known
    n_tokens: NDArray[np.int32]  # [n]
    topic: NDArray[np.int32]  # [n]
    topics: tuple[str, ...]


class History:
    """A fixed number of slots; the shipped entries keep theirs, observed ones share the rest.

    When all are taken, the oldest observed entry makes room. Arrays are reserved at full size,
    which costs address space only, so a view of the filled part is always contiguous.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        layers: int,
        experts: int,
        capacity: int,
        moe_layers: Sequence[int] | None = None,
    ) -> None:
        """`moe_layers` are those with experts; all unless given."""
        self._vectors = np.zeros((capacity, hidden_size), np.float32)
        self._profiles = np.zeros((capacity, layers, experts), np.float32)
        # The prefill's where nothing has been decoded yet, which `_decoded` counts.
        self._decode_profiles = np.zeros((capacity, layers, experts), np.float32)
        self._decoded = np.zeros(capacity, np.float32)
        self._n_tokens = np.zeros(capacity, np.int32)
        self._demand = np.zeros(capacity, np.float32)
        self._topic = np.zeros(capacity, np.int32)
        self._ids = np.zeros(capacity, np.int64)
        self._topics = [OBSERVED_TOPIC]
        self._moe_layers = list(range(layers) if moe_layers is None else moe_layers)
        self._capacity = capacity
        self._size = 0
        self._next_id = 0
        self.shipped = 0
        self.duplicates = 0
        self.dropped = 0

    @classmethod
    def of(cls, entries: HistoryEntries, *, capacity: int) -> History:
        """Start with shipped entries; they must leave at least one slot free."""
        count, layers, experts = entries.profiles.shape
        if count >= capacity:
            raise ValueError(f"{count} shipped entries do not fit a capacity of {capacity}")
        history = cls(
            hidden_size=entries.vectors.shape[1], layers=layers, experts=experts, capacity=capacity
        )
        history._vectors[:count] = entries.vectors
        history._profiles[:count] = entries.profiles
        known = entries.decode_profiles
        history._decode_profiles[:count] = entries.profiles if known is None else known
        history._decoded[:count] = known is not None
        history._n_tokens[:count] = entries.n_tokens
        history._topic[:count] = entries.topic + 1
        history._topics += entries.topics
        history._demand[:count] = 1
        history._ids[:count] = np.arange(count)
        history._size = history._next_id = history.shipped = count
        return history

    def __len__(self) -> int:
        return self._size

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def vectors(self) -> NDArray[np.float32]:
        return self._vectors[: self._size]

    @property
    def profiles(self) -> NDArray[np.float32]:
        """Of prefill, [entries, layers, experts]."""
        return self._profiles[: self._size]

    @property
    def decode_profiles(self) -> NDArray[np.float32]:
        """Of decode; an entry that nothing was decoded for has its prefill's."""
        return self._decode_profiles[: self._size]

    @property
    def ids(self) -> NDArray[np.int64]:
        """A number per entry that no later entry gets again, even in the same slot."""
        return self._ids[: self._size]

    def topic(self, row: int) -> str:
        return self._topics[int(self._topic[row])]

    def topic_count(self) -> int:
        """Different topics of the shipped entries."""
        return len(np.unique(self._topic[: self.shipped]))

    def set_counts(self) -> dict[str, int]:
        """Entries by the first part of their topic, before the slash."""
        return dict(Counter(self.topic(row).split("/", 1)[0] for row in range(self._size)))

    def add(
        self,
        vector: NDArray[np.float32],
        profile: ActivationProfile,
        decode_profile: ActivationProfile | None,
        n_tokens: int,
    ) -> tuple[int, bool]:
        """Remember an observed prompt; returns its entry's id and whether it was known.

        `decode_profile` is None if nothing was decoded. A known prompt gains demand, and its
        profiles become the means of all its observations.
        """
        row = self._same(vector, n_tokens)
        if row is not None:
            self._profiles[row] = _mean(self._profiles[row], self._demand[row], profile)
            self._demand[row] += 1
            self._note_decode(row, decode_profile)
            self.duplicates += 1
            return int(self._ids[row]), True
        row = self._free_row()
        self._vectors[row] = vector
        self._profiles[row] = profile.shares
        self._decoded[row] = 0
        self._note_decode(row, decode_profile)
        self._n_tokens[row] = n_tokens
        self._topic[row] = 0
        self._demand[row] = 1
        self._ids[row] = self._next_id
        self._next_id += 1
        return self._next_id - 1, False

    def _note_decode(self, row: int, profile: ActivationProfile | None) -> None:
        seen = self._decoded[row]
        if profile is not None:
            self._decode_profiles[row] = _mean(self._decode_profiles[row], seen, profile)
            self._decoded[row] += 1
        elif seen == 0:
            self._decode_profiles[row] = self._profiles[row]

    def _same(self, vector: NDArray[np.float32], n_tokens: int) -> int | None:
        rows = np.flatnonzero(self._n_tokens[: self._size] == n_tokens)
        if len(rows) == 0:
            return None
        similarity = self._vectors[rows] @ vector  # [candidates]
        best = int(similarity.argmax())
        return int(rows[best]) if similarity[best] >= 1 - _SAME_PROMPT else None

    def _free_row(self) -> int:
        if self._size < self._capacity:
            self._size += 1
            return self._size - 1
        self.dropped += 1
        oldest = int(self._ids[self.shipped : self._size].argmin())
        return self.shipped + oldest

    @property
    def mean_prompt_tokens(self) -> float:
        """Over the whole demand; 1 without one."""
        demand = self._demand[: self._size]
        return float(np.average(self._n_tokens[: self._size], weights=demand)) if len(self) else 1.0

    def mean_profiles(self) -> PhaseProfiles:
        """The profiles of the whole demand: every prompt by how often it came, and what was read
        by its length too.

        Uniform rows when there is no history, but for dense layers.
        """
        if len(self) == 0:
            _, layers, experts = self._profiles.shape
            shares = np.zeros((layers, experts), np.float32)
            shares[self._moe_layers] = 1 / experts
            uniform = ActivationProfile(shares)
            return PhaseProfiles(uniform, uniform)
        demand = self._demand[: self._size]
        return PhaseProfiles(
            _weighted_mean(self.profiles, demand * self._n_tokens[: self._size]),
            _weighted_mean(self.decode_profiles, demand),
        )


def _mean(before: NDArray[np.float32], seen: float, new: ActivationProfile) -> NDArray[np.float32]:
    return normalise_rows((before * seen + new.shares) / (seen + 1))


def _weighted_mean(
    profiles: NDArray[np.float32], weights: NDArray[np.floating]
) -> ActivationProfile:
    shares = (weights / weights.sum()).astype(np.float32)
    return ActivationProfile(normalise_rows(np.tensordot(shares, profiles, axes=1)))
