"""A prompt's two activation profiles: what reading it uses, and what writing its answer uses.

The paper lets one matrix serve both (A.7.4). They differ: a chat template's tokens are the larger
part of a short prompt and no part of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe.experts import ActivationProfile

__all__ = ["PhaseProfiles", "normalise_rows"]


@dataclass(frozen=True, slots=True)
class PhaseProfiles:
    """S̃ of prefill and of decode, of one shape."""

    prefill: ActivationProfile
    decode: ActivationProfile

    def expected_routes(
        self, prompt_tokens: float, decode_tokens: float, top_k: int
    ) -> NDArray[np.float64]:
        """Return u of A.10, [layers, experts]: N^topk · (N^in · S̃^pre + N^out · S̃^dec).

        As printed, the prefill term lacks N^topk (papers.md D 8).
        """
        read = prompt_tokens * self.prefill.shares.astype(np.float64)
        written = decode_tokens * self.decode.shares.astype(np.float64)
        result: NDArray[np.float64] = top_k * (read + written)
        return result

    def mixed(self, prompt_tokens: float, decode_tokens: float) -> ActivationProfile:
        """Return the whole request's profile: the shares of its expected routes."""
        return ActivationProfile(
            normalise_rows(self.expected_routes(prompt_tokens, decode_tokens, top_k=1))
        )


def normalise_rows(shares: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scale each row to sum 1, as float32; a row of zeros (a dense layer) stays zero.

    Entries that did not use a layer at all would otherwise leave a mean's row short.
    """
    sums = shares.sum(axis=-1, keepdims=True)
    return (shares / np.where(sums > 0, sums, 1)).astype(np.float32)
