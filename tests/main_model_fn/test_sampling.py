from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from main_model_fn.sampling import perturb
from remoe.generation import SamplingParams

LOGITS = torch.tensor([2.0, 1.5, 0.0, -1.0, 1.0])


def draw(params: SamplingParams, seed: int, generated: list[int] | None = None) -> int:
    return int(perturb(LOGITS, params, seed=seed, generated=generated or []).argmax())


def test_temperature_zero_is_the_argmax_and_draws_nothing() -> None:
    greedy = SamplingParams(temperature=0)
    assert torch.equal(perturb(LOGITS, greedy, seed=1, generated=[]), LOGITS)


def test_draws_follow_the_softmax() -> None:
    params = SamplingParams(temperature=1.3)
    draws = 4000
    counts = torch.bincount(
        torch.tensor([draw(params, seed) for seed in range(draws)]), minlength=5
    )
    expected = (LOGITS / 1.3).softmax(-1) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 0.1 % point with 4 degrees of freedom


@given(seed=st.integers(0, 2**62), position=st.integers(0, 50))
def test_a_seed_and_a_position_give_one_draw(seed: int, position: int) -> None:
    params = SamplingParams(temperature=1.0)
    generated = [0] * position

    def scores(generated: list[int]) -> torch.Tensor:
        return perturb(LOGITS, params, seed=seed, generated=generated)

    assert torch.equal(scores(generated), scores(generated))
    assert not torch.equal(scores(generated), scores([*generated, 0]))


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


def test_penalties_count_what_was_generated() -> None:
    greedy = SamplingParams(temperature=0, frequency_penalty=0.3)
    assert draw(greedy, 0, [0]) == 0
    assert draw(greedy, 0, [0, 0]) == 1
    assert draw(SamplingParams(temperature=0, presence_penalty=0.6), 0, [0]) == 1


def test_repetition_penalty_is_transformers() -> None:
    prompt, generated = [4, 4], [3, 0, 3]
    processor = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=len(prompt))
    expected = processor(torch.tensor([prompt + generated]), LOGITS[None].clone())[0]
    params = SamplingParams(temperature=0, repetition_penalty=1.7)
    got = perturb(LOGITS, params, seed=0, generated=generated)
    assert torch.equal(got, expected)
