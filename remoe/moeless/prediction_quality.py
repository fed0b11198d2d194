"""How good predicted routes are: token by token, and as loads of batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.recording import Recording

__all__ = ["batch_loads", "held_out_batches", "overlap", "pearson"]

Routes = NDArray[np.integer]


def overlap(predicted: Routes, actual: Routes) -> float:
    """|predicted top-k ∩ actual top-k| / k, the mean over tokens; both are [tokens, k]."""
    hits = (predicted[:, :, None] == actual[:, None, :]).any(axis=2)
    return float(hits.mean())


def batch_loads(routes: Routes, batch: NDArray[np.intp], experts: int) -> NDArray[np.float64]:
    """Loads of each batch: [tokens, k] and the tokens' batches, -1 for none, to [batches, experts]."""
    count = int(batch.max(initial=-1)) + 1
    flat = (batch[:, None] * experts + routes)[batch >= 0].ravel()
    return np.bincount(flat, minlength=count * experts).reshape(count, experts).astype(np.float64)


def pearson(predicted: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """Correlation of predicted and true shares of load over all batches and experts, both [b, e].

    Shares, so that large batches count as small ones do. 0 where either never varies.
    """

    def centred(loads: NDArray[np.float64]) -> NDArray[np.float64]:
        shares = loads / np.maximum(loads.sum(axis=1, keepdims=True), 1)
        centred: NDArray[np.float64] = shares - shares.mean()
        return centred

    a, b = centred(predicted), centred(actual)
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def held_out_batches(
    recording: Recording, prompts_per_batch: int = 8
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Batches of held-out prompts: of all they were read with, and of each decode step.

    Both [tokens], -1 where a token is in none. Prompts are drawn without order, always the same.
    """
    held_out = np.flatnonzero(recording.held_out())
    np.random.default_rng(0).shuffle(held_out)
    batch_of = np.full(len(recording.facts.labels), -1, np.intp)
    batch_of[held_out] = np.arange(len(held_out)) // prompts_per_batch
    owner = batch_of[recording.prompt]  # [tokens]
    reading = np.where(recording.decoded, -1, owner)
    # A token's decode step is its place after its prompt's first decoded token.
    first = np.searchsorted(recording.prompt, recording.prompt)
    read = np.bincount(recording.prompt[~recording.decoded], minlength=len(batch_of))
    step = np.arange(len(owner)) - first - read[recording.prompt]
    steps = int(step.max(initial=0)) + 1
    decoding = np.where(recording.decoded & (owner >= 0), owner * steps + step, -1)
    # Numbered without gaps: sequences that ended leave steps without a token.
    used, numbered = np.unique(decoding, return_inverse=True)
    return reading, numbered - int(np.any(used == -1))
