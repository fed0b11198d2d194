from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from main_model_fn.sampling import (
    _filtered,
    _gumbel,
    _penalized,
    _random_bits,
    choose_token,
    takes_likeliest,
)
from remoe.generation import SamplingParams

LOGITS = np.array([2.0, 1.5, 0.0, -1.0, 1.0], np.float32)


def draw(params: SamplingParams, seed: int, generated: list[int] | None = None) -> int:
    return choose_token(LOGITS, params, seed=seed, generated=generated or [])


def noise_of(seed: int, position: int, tokens: NDArray[np.intp]) -> NDArray[np.float64]:
    return _gumbel(_random_bits(seed, position, tokens))


def test_temperature_zero_is_the_argmax_whatever_the_seed() -> None:
    greedy = SamplingParams(temperature=0)
    assert takes_likeliest(greedy)
    assert {draw(greedy, seed) for seed in range(50)} == {0}
    assert not takes_likeliest(SamplingParams(temperature=0, logit_bias={1: 1.0}))


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=1.3), [0, 1, 2, 3, 4]),
        (SamplingParams(temperature=0.8, top_k=3), [0, 1, 4]),
    ],
)
def test_draws_follow_the_softmax(params: SamplingParams, allowed: list[int]) -> None:
    draws = 4000
    counts = np.bincount([draw(params, seed) for seed in range(draws)], minlength=5)
    weights = np.exp(LOGITS[allowed] / params.temperature)
    expected = np.zeros(5)
    expected[allowed] = draws * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    chi_square = float(((counts - expected)[allowed] ** 2 / expected[allowed]).sum())
    assert chi_square < 18.5  # 0.1 % point with 4 degrees of freedom


def test_the_noise_is_gumbels_over_tokens_and_over_positions() -> None:
    """Independent of seed and place: as uniform over a vocabulary as over one token's answer."""
    over_tokens = noise_of(7, 3, np.arange(50_000))
    over_positions = np.concatenate([noise_of(7, at, np.array([11])) for at in range(20_000)])
    over_seeds = np.concatenate([noise_of(seed, 0, np.array([11])) for seed in range(20_000)])
    for noise in (over_tokens, over_positions, over_seeds):
        uniform = np.exp(-np.exp(-noise))
        counts = np.histogram(uniform, bins=20, range=(0, 1))[0]
        expected = len(noise) / 20
        assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 0.1 % point, 19 degrees
        assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.03


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 50))
def test_a_seed_and_a_position_give_one_draw(seed: int, position: int) -> None:
    tokens = np.arange(5)
    noise = noise_of(seed, position, tokens)
    assert np.isfinite(noise).all()
    assert np.array_equal(noise, noise_of(seed, position, tokens))
    assert np.array_equal(noise[[1, 3]], noise_of(seed, position, tokens[[1, 3]]))
    assert not np.array_equal(noise, noise_of(seed, position + 1, tokens))


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.4), {0}),
        (SamplingParams(top_p=0.7), {0, 1}),
        (SamplingParams(top_p=0.0), {0}),
        (SamplingParams(min_p=0.5), {0, 1}),
        (SamplingParams(logit_bias={3: 100.0}), {3}),
        (SamplingParams(temperature=0, logit_bias={0: -100.0}), {1}),
    ],
)
def test_filters_and_bias_leave_only(params: SamplingParams, possible: set[int]) -> None:
    assert {draw(params, seed) for seed in range(200)} == possible


@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([3, 50, 70, 600, 5000]),
    spread=st.sampled_from([0.05, 1.0, 4.0, 20.0]),
    params=st.builds(
        SamplingParams,
        top_k=st.sampled_from([0, 0, 1, 2, 40, 300]),
        top_p=st.sampled_from([1.0, 0.0, 0.1, 0.5, 0.9, 0.999]),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    ),
)
@settings(max_examples=200, deadline=None)
def test_filters_keep_what_transformers_keeps(
    seed: int, vocabulary: int, spread: float, params: SamplingParams
) -> None:
    """However wide the nucleus: few tokens, more than are looked at first, or all."""
    generator = np.random.default_rng(seed)
    scores = (spread * generator.standard_normal(vocabulary)).astype(np.float32)
    expected = torch.from_numpy(scores)[None].double()
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    kept = torch.isfinite(expected[0]).nonzero()[:, 0].numpy()
    tokens, left = _filtered(scores, params)
    assert np.array_equal(left, scores[tokens])
    # Tokens on the very edge of the nucleus may fall either way by rounding.
    assert len(set(tokens) ^ set(kept)) <= (1 if params.top_p in {0.1, 0.5, 0.9, 0.999} else 0)


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 2, 100, 40_000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
)
@settings(deadline=None)
def test_the_draw_is_the_argmax_over_all_tokens_noise(
    seed: int, vocabulary: int, spread: float
) -> None:
    """Though most tokens' noise is never computed."""
    scores = np.random.default_rng(seed).standard_normal(vocabulary) * spread
    logits = scores.astype(np.float32)
    expected = (logits + noise_of(seed, 2, np.arange(vocabulary))).argmax()
    assert choose_token(logits, SamplingParams(), seed=seed, generated=[0, 0]) == expected


def test_equally_likely_tokens_are_kept_together() -> None:
    scores = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.6)):
        assert _filtered(scores, params)[0].tolist() == [1, 2, 3, 4]


def test_penalties_count_what_was_generated() -> None:
    greedy = SamplingParams(temperature=0, frequency_penalty=0.3)
    assert draw(greedy, 0, [0]) == 0
    assert draw(greedy, 0, [0, 0]) == 1
    assert draw(SamplingParams(temperature=0, presence_penalty=0.6), 0, [0]) == 1


def penalized(params: SamplingParams, generated: list[int]) -> NDArray[np.float32]:
    before = LOGITS.copy()
    after = _penalized(LOGITS, params, generated)
    assert np.array_equal(LOGITS, before)
    return after


def test_repetition_penalty_is_transformers() -> None:
    prompt, generated = [4, 4], [3, 0, 3]
    processor = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=len(prompt))
    logits = torch.from_numpy(LOGITS)[None].clone()
    expected = processor(torch.tensor([prompt + generated]), logits)[0]
    got = penalized(SamplingParams(temperature=0, repetition_penalty=1.7), generated)
    assert np.array_equal(got, expected.numpy())


def test_bias_and_openais_penalties_add_up() -> None:
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={0: -1.0, 2: 4.0}
    )
    got = penalized(params, [1, 0, 1])
    assert got.tolist() == [2.0 - 1.0 - 0.25, 1.5 + 0.0, 4.0, -1.0, 1.0]
    assert penalized(params, []).tolist() == [1.0, 1.5, 4.0, -1.0, 1.0]
