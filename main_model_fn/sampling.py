"""A request's next token from its row of logits, by its own parameters, whatever shares the batch.

A draw from softmax(scores) is the argmax of scores plus Gumbel noise. The noise of a token is a
hash of the seed, the position in the answer and the token, so that a seeded draw is the same in
any company, and only the tokens that the filters leave need any. In numpy, one thread: a parallel
region of torch costs more than a row of a vocabulary, tens of milliseconds on busy cores.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from remoe.generation import SamplingParams

__all__ = ["choose_token", "takes_likeliest"]

_NUCLEUS_START = 64  # likeliest tokens among which top-p is sought first


def takes_likeliest(params: SamplingParams) -> bool:
    """Whether the choice is the argmax of the logits as they are."""
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.logit_bias
    )


def choose_token(
    logits: NDArray[np.float32], params: SamplingParams, *, seed: int, generated: list[int]
) -> int:
    """The next token after `generated`; `logits` is float32 [vocab] and is not changed.

    Greedy (temperature 0) draws nothing. The order is bias and penalties, temperature, then top-k,
    top-p and min-p on what is left. Of equally likely tokens a filter keeps all or none.
    """
    scores = logits if takes_likeliest(params) else _penalized(logits, params, generated)
    if params.temperature == 0:
        return int(scores.argmax())
    tokens, left = _filtered(scores / np.float32(params.temperature), params)
    bits = _random_bits(seed, len(generated), tokens)
    # Only those can win whose score, with the most noise of all, beats the likeliest with its own.
    likeliest = left.argmax()
    needed = left[likeliest] + _gumbel(bits[likeliest]) - _gumbel(bits.max())
    able = np.flatnonzero(left >= needed - 1e-6)  # roundings
    return int(tokens[able[(left[able] + _gumbel(bits[able])).argmax()]])


def _penalized(
    logits: NDArray[np.float32], params: SamplingParams, generated: list[int]
) -> NDArray[np.float32]:
    scores = logits.copy()
    ids, counts = np.unique(np.array(generated, np.intp), return_counts=True)
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        seen = scores[ids]
        scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    if params.logit_bias:
        biased = np.fromiter(params.logit_bias, np.intp)
        scores[biased] += np.fromiter(params.logit_bias.values(), np.float32)
    scores[ids] -= (
        params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    ).astype(np.float32)
    return scores


def _filtered(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The tokens inside top-k, top-p and min-p, in the order of their ids, and their scores."""
    tokens = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        kept = scores >= _largest(scores, params.top_k)[-1]
        tokens, scores = tokens[kept], scores[kept]
    if params.top_p < 1:
        kept = scores >= _nucleus_threshold(scores, params.top_p)
        tokens, scores = tokens[kept], scores[kept]
    if params.min_p > 0:
        kept = scores >= scores.max() + math.log(params.min_p)
        tokens, scores = tokens[kept], scores[kept]
    return tokens, scores


def _nucleus_threshold(scores: NDArray[np.float32], top_p: float) -> np.float32:
    """The score of the last token needed for a mass of `top_p`, the likeliest taken first.

    A nucleus is mostly small, so it is sought among a bounded number of the likeliest, and among
    more if those are not enough: a vocabulary is never sorted for it unless all of it is needed.
    """
    top = scores.max()
    total = np.exp(scores - top).sum(dtype=np.float64)
    count = _NUCLEUS_START
    while True:
        largest = _largest(scores, count)
        mass = np.exp(largest - top).cumsum(dtype=np.float64)
        last = int(np.searchsorted(mass, top_p * total))  # first at which the mass is reached
        if last < len(largest) or len(largest) == len(scores):
            return np.float32(largest[min(last, len(largest) - 1)])
        count *= 8


def _largest(scores: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The `count` largest scores, or all, in falling order."""
    if count < len(scores):
        scores = np.partition(scores, len(scores) - count)[len(scores) - count :]
    return np.sort(scores)[::-1]


def _random_bits(seed: int, position: int, tokens: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Of each token, whichever others are asked for."""
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(position))
    return _mix(tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)


def _gumbel(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Gumbel noise of random bits; it grows with them."""
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
