"""Pages of a prompt that another request has read are shared, and everything stays right.

A page has 16 tokens and a step 64. "Rows" are what the model computed: two routes each a layer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.metering import Span
from remoe.generation import GenerateEvent, SamplingParams
from remoe.kernel.native_library import NativePool
from tests.main_model_fn.asking import Pages, ask, collect, generate, random_prompt
from tests.tiny_model import InProcessTransport, native, new_meter, split

PAGE = 16


def prefill_rows(last: GenerateEvent) -> int:
    assert last.stats is not None
    counts = np.array(last.stats.prefill_counts).sum(axis=1)
    assert len(set(counts.tolist())) == 1
    return int(counts[0]) // 2


def decode_rows(last: GenerateEvent) -> int:
    assert last.stats is not None
    return int(np.array(last.stats.decode_counts)[0].sum()) // 2


@pytest.mark.parametrize(
    ("length", "computed"),
    [
        (15, 15),  # no complete page
        (16, 16),  # the last row is always computed, so this page is not shared
        (17, 1),
        (40, 8),  # the part of a page at the end is not shared
        (64, 16),
        (150, 6),
    ],
)
def test_a_repeated_prompt_computes_only_its_last_rows(
    engine: Engine, unmodified: PreTrainedModel, length: int, computed: int
) -> None:
    prompt = random_prompt(1000 + length, length)
    expected = generate(unmodified, prompt)
    first, second = (asyncio.run(collect(engine, ask(prompt))) for _ in range(2))
    assert first[0] == second[0] == expected
    assert (prefill_rows(first[1]), prefill_rows(second[1])) == (length, computed)
    assert decode_rows(first[1]) == decode_rows(second[1]) == 15
    asyncio.run(Pages(engine).become_idle())


def test_what_is_reused_is_not_billed(engine: Engine) -> None:
    prompt = random_prompt(70, 160)
    first, second = (asyncio.run(collect(engine, ask(prompt, tokens=1)))[1] for _ in range(2))
    assert first.stats is not None
    assert second.stats is not None
    assert first.stats.ledger.remote_rows > 3 * second.stats.ledger.remote_rows > 0
    assert first.stats.ledger.remote_gb_s > second.stats.ledger.remote_gb_s
    assert second.stats.prompt_tokens == 160


def test_prompts_share_as_far_as_they_are_equal(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    begun = random_prompt(71, 48)
    asyncio.run(collect(engine, ask(begun + random_prompt(72, 30))))
    for seed, same in ((73, 48), (74, 40), (75, 16), (76, 3)):
        prompt = begun[:same] + random_prompt(seed, 90 - same)
        tokens, last = asyncio.run(collect(engine, ask(prompt)))
        assert tokens == generate(unmodified, prompt)
        assert prefill_rows(last) == 90 - same // PAGE * PAGE


def test_an_answer_is_a_prefix_of_the_next_turn(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    prompt = random_prompt(77, 30)
    answer, _ = asyncio.run(collect(engine, ask(prompt, tokens=40)))
    turn = [*prompt, *answer, *random_prompt(78, 9)]
    tokens, last = asyncio.run(collect(engine, ask(turn)))
    assert tokens == generate(unmodified, turn)
    # The last generated token never passed the model: 69 of 79 are cached, 64 in complete pages.
    assert prefill_rows(last) == 79 - 64


def test_other_choices_reuse_the_prompt_while_the_first_still_runs(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    """As a gateway asks for `n`: the others once the first has its first token."""
    prompt = random_prompt(79, 100)
    sampled = [
        ask(prompt, tokens=20, sampling=SamplingParams(temperature=1.5, seed=seed))
        for seed in range(3)
    ]
    pages = Pages(engine)

    async def run() -> tuple[list[int], list[tuple[list[int], GenerateEvent]]]:
        first = engine.generate(ask(prompt, tokens=300))
        tokens = list((await anext(first)).tokens)
        alone = pages.used
        others = asyncio.gather(*(collect(engine, request) for request in sampled))
        answers = await others
        assert alone == 7
        last = None
        async for event in first:
            tokens += event.tokens
            last = event
        assert last is not None
        assert prefill_rows(last) == 100
        assert len(tokens) == 300  # it ran beside all of them
        return tokens, answers

    tokens, answers = asyncio.run(run())
    assert tokens == generate(unmodified, prompt, 300)
    assert [prefill_rows(last) for _, last in answers] == [100 - 96] * 3
    assert [decode_rows(last) for _, last in answers] == [19] * 3
    solo = [asyncio.run(collect(engine, request))[0] for request in sampled]
    assert [tokens for tokens, _ in answers] == solo
    assert len({tuple(answer) for answer in solo}) == 3


def test_kept_pages_make_way_when_room_is_needed(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    """Of 64 pages most are soon kept for prefixes; requests that need them get them."""
    pages = Pages(engine)
    for seed in range(80, 90):
        prompt = random_prompt(seed, 200)
        tokens, _ = asyncio.run(collect(engine, ask(prompt, tokens=4)))
        assert tokens == generate(unmodified, prompt, 4)
    assert pages.kept > 0
    prompt = random_prompt(90, 900)
    tokens, last = asyncio.run(collect(engine, ask(prompt, tokens=20)))
    assert tokens == generate(unmodified, prompt, 20)
    assert prefill_rows(last) == 900


@pytest.mark.parametrize("natively", [False, True])
def test_a_full_cache_changes_no_answer_and_no_count(
    tiny_model_dir: Path,
    unmodified: PreTrainedModel,
    pool: NativePool,
    natively: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Streams outgrow the cache together: some are put off, and computed again later."""
    meter, transport = new_meter(), InProcessTransport(tiny_model_dir)
    remote = ((0,), (1,), (2,))
    model: Any = (
        native(tiny_model_dir, remote, transport, meter, pool)
        if natively
        else split(tiny_model_dir, remote, transport, meter)
    )
    limits = EngineLimits(
        kv_tokens=256, page_tokens=16, batch_tokens=64, max_requests=8, max_queue=8
    )
    engine = Engine(model, meter, limits=limits, deployment_plan_id="plan-test")
    engine.start()
    wild = SamplingParams(temperature=1.3, frequency_penalty=0.5, seed=3, top_p=0.95)
    prompts = [random_prompt(200 + n, 20) for n in range(6)]
    requests = [ask(prompt, tokens=80) for prompt in prompts[:3]]
    requests += [ask(prompt, tokens=80, sampling=wild, logprobs=0) for prompt in prompts[3:]]

    async def together() -> list[tuple[list[int], GenerateEvent]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    rows: list[int] = []
    begin_step = meter.begin_step

    def counting(spans: list[Span], now: float) -> None:
        rows.extend(span.rows for span in spans)
        begin_step(spans, now)

    monkeypatch.setattr(meter, "begin_step", counting)
    try:
        answers = asyncio.run(together())
        recomputed = sum(rows) - 6 * (20 + 79)
        alone = [asyncio.run(collect(engine, request))[0] for request in requests]
    finally:
        engine.stop()
    assert recomputed > 0  # else this tests nothing
    assert [tokens for tokens, _ in answers] == alone
    assert alone[:3] == [generate(unmodified, prompt, 80) for prompt in prompts[:3]]
    for _, last in answers:
        assert (prefill_rows(last), decode_rows(last)) == (20, 79)
