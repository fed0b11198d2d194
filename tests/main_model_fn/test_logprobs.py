"""Log-probabilities against log_softmax of the unmodified model's logits."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from main_model_fn import prompt_scoring
from main_model_fn.engine import Engine
from main_model_fn.logprobs import token_logprob, token_logprobs
from remoe.errors import InvalidRequestError
from remoe.generation import GenerateRequest, SamplingParams, TokenLogprob
from tests.main_model_fn.asking import GREEDY, ask, collect, events, generate, random_prompt
from tests.tiny_model import VOCABULARY

TOLERANCE = 1e-4
WILD = SamplingParams(
    temperature=1.7, top_k=9, presence_penalty=1.0, logit_bias={3: 2.0}, seed=5, top_p=0.8
)


def model_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Row i is of the token after the first i + 1: [tokens, vocab]."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float().log_softmax(-1)


def assert_entry(entry: TokenLogprob | None, row: torch.Tensor, token: int, top: int) -> None:
    assert entry is not None
    assert entry.token == token
    assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
    best = row.topk(top) if top else None
    expected = [] if best is None else best.values.tolist()
    assert [alternative.logprob for alternative in entry.top] == pytest.approx(
        expected, abs=TOLERANCE
    )
    for alternative in entry.top:
        assert alternative.logprob == pytest.approx(float(row[alternative.token]), abs=TOLERANCE)
    assert len({alternative.token for alternative in entry.top}) == top


async def run_all(
    engine: Engine, requests: list[GenerateRequest]
) -> list[tuple[list[int], list[TokenLogprob], list[TokenLogprob | None]]]:
    told = await asyncio.gather(*(events(engine, request) for request in requests))
    return [
        (
            [token for event in one for token in event.tokens],
            [entry for event in one for entry in event.logprobs],
            [entry for event in one for entry in event.prompt_logprobs],
        )
        for one in told
    ]


def test_they_are_the_models_own_in_a_mixed_batch(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    """Prompts in pieces (a step has 64 tokens), beside streams that ask for nothing or sample."""
    requests = [
        ask(random_prompt(40, 150), prompt_logprobs=3, logprobs=20),
        ask(random_prompt(41, 5), tokens=40),
        ask(random_prompt(42, 90), sampling=WILD, prompt_logprobs=0, logprobs=0),
        ask(random_prompt(43, 1), logprobs=2, prompt_logprobs=1),
        ask(random_prompt(44, 65), tokens=0, prompt_logprobs=20),
        ask(random_prompt(45, 20), sampling=WILD, logprobs=5),
    ]
    answers = asyncio.run(run_all(engine, requests))
    for request, (tokens, logprobs, prompt_logprobs) in zip(requests, answers, strict=True):
        prompt = request.prompt_tokens
        rows = model_logprobs(unmodified, prompt + tokens)
        if request.sampling == GREEDY and request.max_new_tokens:
            assert tokens == generate(unmodified, prompt, request.max_new_tokens)
        assert len(tokens) == request.max_new_tokens
        assert len(logprobs) == (0 if request.logprobs is None else len(tokens))
        for place, entry in enumerate(logprobs):
            row = rows[len(prompt) - 1 + place]
            assert_entry(entry, row, tokens[place], request.logprobs or 0)
        if request.prompt_logprobs is None:
            assert prompt_logprobs == []
            continue
        assert prompt_logprobs[0] is None
        assert len(prompt_logprobs) == len(prompt)
        for place in range(1, len(prompt)):
            row = rows[place - 1]
            assert_entry(prompt_logprobs[place], row, prompt[place], request.prompt_logprobs)


def test_a_prompt_can_be_scored_alone(engine: Engine) -> None:
    (event,) = asyncio.run(events(engine, ask(random_prompt(7, 30), tokens=0, prompt_logprobs=1)))
    assert event.finish == "length"
    assert event.tokens == []
    assert event.logprobs == []
    assert len(event.prompt_logprobs) == 30
    assert event.stats is not None
    assert event.stats.output_tokens == 0
    assert np.array(event.stats.prefill_counts).sum(axis=1).tolist() == [60] * 3
    assert np.array(event.stats.decode_counts).sum() == 0


def test_a_stop_token_is_not_sent_and_nor_is_its_logprob(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    prompt = random_prompt(11, 6)
    expected = generate(unmodified, prompt)
    request = ask(prompt, stop=(expected[9],), logprobs=1)
    ((tokens, logprobs, _),) = asyncio.run(run_all(engine, [request]))
    assert tokens == expected[: expected.index(expected[9])]
    assert [entry.token for entry in logprobs] == tokens


def test_a_scored_prompt_skips_no_row_whoever_computed_its_prefix(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    prompt = random_prompt(46, 70)

    async def run() -> None:
        await collect(engine, ask(prompt))
        (scored,) = await run_all(engine, [ask(prompt, prompt_logprobs=0)])
        rows = model_logprobs(unmodified, prompt)
        for place in range(1, 70):
            assert_entry(scored[2][place], rows[place - 1], prompt[place], 0)
        # And pages that a scored prompt filled serve others.
        _, last = await collect(engine, ask(prompt))
        assert last.stats is not None
        assert np.array(last.stats.prefill_counts)[0].sum() == 2 * (70 - 64)

    asyncio.run(run())


def test_a_long_prompt_is_scored_a_bounded_number_of_logits_at_a_time(
    engine: Engine, unmodified: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def noting(logits: torch.Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
        sizes.append(len(logits))
        return token_logprobs(logits, tokens, top)

    monkeypatch.setattr(prompt_scoring, "_MAX_LOGITS", 10 * VOCABULARY + 5)
    monkeypatch.setattr(prompt_scoring, "token_logprobs", noting)
    prompt = random_prompt(47, 100)
    ((_, _, scored),) = asyncio.run(run_all(engine, [ask(prompt, prompt_logprobs=2)]))
    rows = model_logprobs(unmodified, prompt)
    for place in range(1, 100):
        assert_entry(scored[place], rows[place - 1], prompt[place], 2)
    assert max(sizes) == 10
    assert sum(sizes) == 99


@pytest.mark.parametrize("top", [-1, 21])
def test_more_than_twenty_alternatives_are_refused(engine: Engine, top: int) -> None:
    for request in (ask([1], logprobs=top), ask([1], prompt_logprobs=top)):
        with pytest.raises(InvalidRequestError, match="0 to 20"):
            engine.check(request)


@given(
    seed=st.integers(0, 1000),
    vocabulary=st.integers(20, 200),
    top=st.integers(0, 20),
    spread=st.sampled_from([1.0, 100.0]),
)
@settings(deadline=None, max_examples=50)
def test_one_row_and_many_agree_with_log_softmax(
    seed: int, vocabulary: int, top: int, spread: float
) -> None:
    logits = spread * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))
    tokens = [seed % vocabulary, 0, vocabulary - 1]
    rows = logits.double().log_softmax(-1)
    for entries in (
        token_logprobs(logits, tokens, top),
        [token_logprob(row.numpy(), token, top) for row, token in zip(logits, tokens, strict=True)],
    ):
        for entry, row, token in zip(entries, rows, tokens, strict=True):
            assert_entry(entry, row, token, top)
