"""Plans for the demand rather than for a request, and when a new one is worth its change.

A sliding window of finished requests gives the demand-weighted profile. While the main function
runs, its partition changes only if what the requests of a window would save exceeds what the
change itself costs: plans that chase every prompt would move experts forever.

Ours, beyond papers.md A.15.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.forecast import Workload
from planner.phases import PhaseProfiles, normalise_rows
from remoe.experts import ActivationProfile, Partition
from remoe.plan import Deployment

__all__ = ["DemandWindow", "EpochReview", "decide", "newly_local"]

_MOST_REQUESTS = 512


class EpochReview(msgspec.Struct, frozen=True, kw_only=True):
    """Whether to change a running partition. `candidate` is null where nothing would change.

    Costs are of the mean request of the window; `expected_requests` is how many the next window
    will bring if it is like the last.
    """

    change: bool
    why: str
    current_cost_usd: float | None = None
    candidate_cost_usd: float | None = None
    expected_requests: int = 0
    cost_of_change_usd: float | None = None
    candidate: Deployment | None = None


@dataclass(frozen=True, slots=True)
class _Finished:
    at_s: float
    prefill: NDArray[np.float32]
    decode: NDArray[np.float32]
    prompt_tokens: int
    decode_tokens: float


class DemandWindow:
    """The requests finished in the last `length_s`, at most the newest 512."""

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self._finished: deque[_Finished] = deque(maxlen=_MOST_REQUESTS)

    def add(
        self,
        at_s: float,
        prefill: ActivationProfile,
        decode: ActivationProfile | None,
        prompt_tokens: int,
        decode_tokens: float,
    ) -> None:
        written = prefill if decode is None else decode
        self._finished.append(
            _Finished(at_s, prefill.shares, written.shares, prompt_tokens, decode_tokens)
        )

    def demand(self, now_s: float) -> tuple[PhaseProfiles, Workload, int] | None:
        """Mean profiles by tokens, the mean request, and how many there were; None without any."""
        while self._finished and self._finished[0].at_s < now_s - self.length_s:
            self._finished.popleft()
        if not self._finished:
            return None
        read = np.array([one.prompt_tokens for one in self._finished], np.float32)
        written = np.array([one.decode_tokens for one in self._finished], np.float32)
        profiles = PhaseProfiles(
            _mean([one.prefill for one in self._finished], read),
            _mean([one.decode for one in self._finished], written if written.any() else read),
        )
        workload = Workload(max(1, round(float(read.mean()))), float(written.mean()))
        return profiles, workload, len(self._finished)


def _mean(profiles: list[NDArray[np.float32]], weights: NDArray[np.float32]) -> ActivationProfile:
    mixed = np.tensordot(weights / weights.sum(), np.stack(profiles), axes=1)
    return ActivationProfile(normalise_rows(mixed))


def newly_local(current: Partition, candidate: Partition) -> int:
    """How many experts the main function would have to read."""
    return len(set(current.remote_ids()) - set(candidate.remote_ids()))


def decide(
    *,
    current_usd: float,
    candidate_usd: float,
    requests: int,
    change_usd: float,
    candidate: Deployment,
) -> EpochReview:
    """Change if the window's requests would save more than the change costs."""
    saving = (current_usd - candidate_usd) * requests
    change = saving > change_usd
    return EpochReview(
        change=change,
        why=(
            f"{requests} requests like the last would save {saving:.3g} USD, and the change costs "
            f"{change_usd:.3g} USD."
        ),
        current_cost_usd=current_usd,
        candidate_cost_usd=candidate_usd,
        expected_requests=requests,
        cost_of_change_usd=change_usd,
        candidate=candidate if change else None,
    )
