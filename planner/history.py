"""Prompts seen before: their vectors, what they activated, and how often they came.

Vectors are in memory, everything is in the store, and an observation is taken in only once it is
durable there. Bounded: when full, the prompt that has the most similar other is folded into it, so
that coverage is kept and no demand is lost. Not thread-safe: one thread at a time.

See papers.md A.7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.history_store import Entry, HistoryIdentity, HistoryStore
from planner.phases import PhaseProfiles, normalise_rows
from remoe.experts import ActivationProfile

__all__ = ["OBSERVED_TOPIC", "History"]

OBSERVED_TOPIC = "observed"
# Prompts of equal length and direction are one prompt to every predictor built on the vector;
# float16 storage moves a cosine by less than this.
_SAME_PROMPT = 1e-6
# Of a full history so many prompts, at random, are candidates for folding: comparing all pairs of
# 20,000 would take seconds.
_FOLD_CANDIDATES = 32


class History:
    """A fixed number of rows; a row's entry changes when its prompt is folded into another.

    Arrays are reserved at full size, which costs address space only, so a view of the filled part
    is always contiguous.
    """

    def __init__(
        self, store: HistoryStore, *, capacity: int, moe_layers: Sequence[int] | None = None
    ) -> None:
        """Read the store; `moe_layers` are those with experts, all unless given."""
        identity = store.identity
        self.store = store
        self._vectors = np.zeros((capacity, identity.dimension), np.float32)
        self._n_tokens = np.zeros(capacity, np.int32)
        self._demand = np.zeros(capacity, np.float64)
        self._ids = np.zeros(capacity, np.int64)
        self._topics: list[str] = []
        # Sums over the whole demand, so that its mean profile costs nothing: prefill by tokens.
        self._sums = np.zeros((2, identity.layers, identity.experts))
        self._moe_layers = list(range(identity.layers) if moe_layers is None else moe_layers)
        self._capacity = capacity
        self._chance = np.random.default_rng(0)
        self._next_id = store.next_id
        self.seen_again = 0
        self.folded = 0
        beyond = []  # the capacity was lowered
        for entry in store.entries():
            if len(self) < capacity:
                self._put(len(self), entry)
            else:
                beyond.append(entry)
        for entry in beyond:
            self._take(entry)

    @classmethod
    def in_memory(
        cls,
        *,
        dimension: int,
        layers: int,
        experts: int,
        capacity: int,
        moe_layers: Sequence[int] | None = None,
    ) -> History:
        """An empty one that is gone with the process."""
        identity = HistoryIdentity("", "", dimension, layers, experts)
        return cls(HistoryStore(identity), capacity=capacity, moe_layers=moe_layers)

    def __len__(self) -> int:
        return len(self._topics)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Of unit length, [entries, dimension]."""
        return self._vectors[: len(self)]

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        return self._n_tokens[: len(self)]

    @property
    def ids(self) -> NDArray[np.int64]:
        """A number per row that no later entry gets again, even in the same row."""
        return self._ids[: len(self)]

    @property
    def demand(self) -> NDArray[np.float64]:
        """How often each prompt came, those folded into it included."""
        return self._demand[: len(self)]

    def profiles(self, rows: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """Profiles of prefill and decode, [rows, 2, layers, experts], read from the store.

        An entry that nothing was decoded for has its prefill's.
        """
        return self.store.profiles(self._ids[rows].tolist())

    def topic(self, row: int) -> str:
        return self._topics[row]

    @property
    def shipped(self) -> int:
        """Entries that came from a file."""
        return sum(topic != OBSERVED_TOPIC for topic in self._topics)

    def topic_count(self) -> int:
        """Different topics of the entries from files."""
        return len(set(self._topics) - {OBSERVED_TOPIC})

    def set_counts(self) -> dict[str, int]:
        """Entries by the first part of their topic, before the slash."""
        return dict(Counter(topic.split("/", 1)[0] for topic in self._topics))

    def add(
        self,
        vector: NDArray[np.float32],
        profile: ActivationProfile,
        decode_profile: ActivationProfile | None,
        n_tokens: int,
        *,
        decode_tokens: float = 0.0,
        at_s: float = 0.0,
    ) -> tuple[int, bool]:
        """Remember an observed prompt; returns its entry's id and whether it was known.

        `decode_profile` is None if nothing was decoded. A known prompt gains demand, and its
        profiles become the means of all its observations. Raises HistoryUnwritableError, and
        remembers nothing, if the store cannot keep it.
        """
        decode = profile if decode_profile is None else decode_profile
        seen = Entry(
            id=self._next_id,
            vector=vector,
            prefill=_stored(profile.shares),
            decode=_stored(decode.shares),
            n_tokens=n_tokens,
            decode_tokens=0.0 if decode_profile is None else decode_tokens,
            demand=1.0,
            decoded=float(decode_profile is not None),
            topic=OBSERVED_TOPIC,
            first_seen_s=at_s,
            last_seen_s=at_s,
        )
        return self._take(seen)

    def absorb(self, entries: Iterable[Entry], *, digest: str) -> None:
        """Take in the entries of a file, all or none, unless a file of this digest was before.

        Their ids are given anew. After an error this object is not to be used on.
        """
        if self.store.imported(digest):
            return
        with self.store.batch(imported=digest):
            for entry in entries:
                self._take(replace(entry, id=self._next_id))

    def _take(self, seen: Entry) -> tuple[int, bool]:
        """Store first, then remember: what the store refuses has not happened."""
        row = self._same(seen.vector, seen.n_tokens)
        if row is not None:
            self._merge_into(row, seen)
            self.seen_again += 1
            return int(self._ids[row]), True
        if len(self) == self._capacity:
            return self._take_when_full(seen), False
        self.store.commit([seen])
        self._put(len(self), seen)
        return seen.id, False

    def _take_when_full(self, seen: Entry) -> int:
        """Fold the closest pair into one, whether the new prompt is of it or not."""
        similarity = self.vectors @ seen.vector  # [entries]
        nearest = int(similarity.argmax())
        first, second, closest = self._closest_pair()
        if similarity[nearest] >= closest:
            self._merge_into(nearest, seen)
            kept = int(self._ids[nearest])
        else:
            # Of two alike the one that came more often stays; then the newer.
            rank = [(self._demand[row], self._ids[row]) for row in (first, second)]
            stays, goes = (first, second) if rank[0] > rank[1] else (second, first)
            leaving, before = self._entry(goes), self._entry(stays)
            after = _merged(before, leaving)
            self.store.commit([after, seen], removed=[leaving.id])
            self._count(before, -1)
            self._put(stays, after)
            self._count(leaving, -1)
            self._put(goes, seen)
            kept = seen.id
        self.folded += 1
        return kept

    def _closest_pair(self) -> tuple[int, int, float]:
        """Rows of two similar entries and their similarity; the best pair of a random sample."""
        count = len(self)
        if count == 1:
            return 0, 0, -np.inf
        sample = self._chance.choice(count, min(count, _FOLD_CANDIDATES), replace=False)
        similarity = self.vectors[sample] @ self.vectors.T  # [sample, entries]
        similarity[np.arange(len(sample)), sample] = -np.inf
        place, other = divmod(int(similarity.argmax()), count)
        return int(sample[place]), other, float(similarity[place, other])

    def _merge_into(self, row: int, seen: Entry) -> None:
        before = self._entry(row)
        after = _merged(before, seen)
        self.store.commit([after], removed=[seen.id])
        self._count(before, -1)
        self._put(row, after)

    def _entry(self, row: int) -> Entry:
        # The store's vector is rounded.
        return replace(self.store.entry(int(self._ids[row])), vector=self._vectors[row].copy())

    def _put(self, row: int, entry: Entry) -> None:
        """Let a row hold an entry, and count its demand."""
        self._vectors[row] = entry.vector
        self._n_tokens[row] = entry.n_tokens
        self._demand[row] = entry.demand
        self._ids[row] = entry.id
        self._topics[row : row + 1] = [entry.topic]
        self._next_id = max(self._next_id, entry.id + 1)
        self._count(entry, +1)

    def _count(self, entry: Entry, sign: int) -> None:
        self._sums[0] += sign * entry.demand * entry.n_tokens * entry.prefill
        self._sums[1] += sign * entry.demand * entry.decode

    def _same(self, vector: NDArray[np.float32], n_tokens: int) -> int | None:
        rows = np.flatnonzero(self.n_tokens == n_tokens)
        if len(rows) == 0:
            return None
        similarity = self._vectors[rows] @ vector  # [candidates]
        best = int(similarity.argmax())
        return int(rows[best]) if similarity[best] >= 1 - _SAME_PROMPT else None

    @property
    def mean_prompt_tokens(self) -> float:
        """Over the whole demand; 1 without one."""
        return float(np.average(self.n_tokens, weights=self.demand)) if len(self) else 1.0

    def mean_profiles(self) -> PhaseProfiles:
        """The profiles of the whole demand: every prompt by how often it came, and what was read
        by its length too.

        Uniform rows when there is no history, but for dense layers.
        """
        if len(self) == 0:
            _, layers, experts = self._sums.shape
            shares = np.zeros((layers, experts), np.float32)
            shares[self._moe_layers] = 1 / experts
            uniform = ActivationProfile(shares)
            return PhaseProfiles(uniform, uniform)
        # What was added and taken away again may leave a rounding error below zero.
        prefill, decode = (
            ActivationProfile(normalise_rows(np.maximum(total, 0))) for total in self._sums
        )
        return PhaseProfiles(prefill, decode)


def _stored(profile: NDArray[np.float32]) -> NDArray[np.float32]:
    """As the store will give it back, so that what is counted can be taken away again."""
    return profile.astype(np.float16).astype(np.float32)


def _merged(kept: Entry, other: Entry) -> Entry:
    """One entry for two: of the first prompt, with the demand and the mean profiles of both."""
    decoded = kept.decoded + other.decoded
    prefill = _mean(kept.prefill, kept.demand, other.prefill, other.demand)
    return replace(
        kept,
        prefill=prefill,
        decode=_mean(kept.decode, kept.decoded, other.decode, other.decoded)
        if decoded
        else prefill,
        decode_tokens=(kept.decode_tokens * kept.decoded + other.decode_tokens * other.decoded)
        / (decoded or 1),
        demand=kept.demand + other.demand,
        decoded=decoded,
        first_seen_s=min(kept.first_seen_s, other.first_seen_s),
        last_seen_s=max(kept.last_seen_s, other.last_seen_s),
    )


def _mean(
    first: NDArray[np.float32], first_weight: float, second: NDArray[np.float32], weight: float
) -> NDArray[np.float32]:
    return _stored(normalise_rows(first * first_weight + second * weight))
