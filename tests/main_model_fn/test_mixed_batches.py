"""Streams of every kind together: each answers as if it were alone, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from main_model_fn.engine import Engine
from main_model_fn.metering import Span
from main_model_fn.sampling import choose_token
from main_model_fn.transport import RemoteResult
from remoe.generation import GenerateEvent, GenerateRequest, SamplingParams
from tests.main_model_fn.asking import Pages, ask, collect, events, generate, random_prompt

EVERY_KIND = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top-p": SamplingParams(temperature=1.4, top_p=0.7, seed=2),
    "top-k": SamplingParams(temperature=1.4, top_k=5, seed=3),
    "min-p": SamplingParams(temperature=1.4, min_p=0.2, seed=4),
    "presence": SamplingParams(temperature=0, presence_penalty=2.0),
    "frequency": SamplingParams(temperature=0, frequency_penalty=1.5),
    "repetition": SamplingParams(temperature=0, repetition_penalty=1.8),
    "bias": SamplingParams(temperature=0, logit_bias={5: 30.0, 6: -100.0}),
    "all": SamplingParams(
        temperature=1.1,
        top_p=0.9,
        top_k=30,
        min_p=0.01,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={7: 1.5},
        seed=5,
    ),
}


def plain_loop(model: PreTrainedModel, request: GenerateRequest) -> list[int]:
    """The answer by whole forward passes of the unmodified model, without any cache."""
    tokens: list[int] = []
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt_tokens + tokens])).logits[0, -1]
        row = logits.float().numpy()
        params = request.sampling
        tokens.append(choose_token(row, params, seed=params.seed or 0, generated=tokens))
    return tokens


def test_each_kind_answers_as_the_plain_model_would(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    requests = [
        ask(random_prompt(300 + place, 3 + 11 * place), tokens=12, sampling=params)
        for place, params in enumerate(EVERY_KIND.values())
    ]

    async def together() -> list[list[int]]:
        """Eight at a time are admitted, so the two last come while others run."""
        first = asyncio.gather(*(collect(engine, request) for request in requests[:8]))
        early = await first
        late = await asyncio.gather(*(collect(engine, request) for request in requests[8:]))
        return [tokens for tokens, _ in (*early, *late)]

    for name, tokens, request in zip(EVERY_KIND, asyncio.run(together()), requests, strict=True):
        assert tokens == plain_loop(unmodified, request), name


def test_a_seed_is_reproduced_among_streams_that_come_and_go(engine: Engine) -> None:
    seeded = ask(random_prompt(320, 40), tokens=30, sampling=EVERY_KIND["all"])
    alone, _ = asyncio.run(collect(engine, seeded))
    rng = random.Random(0)

    async def noise(number: int) -> None:
        for turn in range(4):
            prompt = random_prompt(330 + 10 * number + turn, rng.randint(1, 120))
            stream = engine.generate(ask(prompt, tokens=25, sampling=SamplingParams()))
            for _ in range(rng.randint(0, 12)):
                await anext(stream)
            await stream.aclose()

    async def in_company() -> list[list[int]]:
        around = [asyncio.ensure_future(noise(number)) for number in range(5)]
        answers = [(await collect(engine, seeded))[0] for _ in range(3)]
        await asyncio.gather(*around)
        return answers

    assert asyncio.run(in_company()) == [alone] * 3


@pytest.mark.parametrize("params", [EVERY_KIND["greedy"], EVERY_KIND["all"]])
def test_any_of_several_stop_tokens_ends_one_stream_and_no_other(
    engine: Engine, params: SamplingParams
) -> None:
    request = ask(random_prompt(340, 9), tokens=24, sampling=params)
    whole, _ = asyncio.run(collect(engine, request))
    stops = (whole[20], whole[10])
    stopped = msgspec.structs.replace(request, stop_tokens=list(stops))

    async def both() -> tuple[tuple[list[int], GenerateEvent], ...]:
        return await asyncio.gather(collect(engine, stopped), collect(engine, request))

    (early, last), (unstopped, _) = asyncio.run(both())
    end = min(whole.index(stop) for stop in stops)
    assert early == whole[:end]
    assert last.finish == "stop"
    assert last.stats is not None
    assert last.stats.output_tokens == end + 1
    assert unstopped == whole


def test_cancelled_at_any_moment_a_stream_frees_its_pages(
    engine: Engine, unmodified: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits, in the middle of its prompt, between tokens, and when it had just ended."""
    pages = Pages(engine)
    long_prompt = random_prompt(350, 600)  # ten steps
    steps, begin_step = [0], engine._meter.begin_step

    def counting(spans: list[Span], now: float) -> None:
        steps[0] += 1
        begin_step(spans, now)

    monkeypatch.setattr(engine._meter, "begin_step", counting)

    async def cancel(request: GenerateRequest, *, after_steps: int, after_events: int) -> None:
        stream = engine.generate(request)
        if after_events:
            for _ in range(after_events):
                await anext(stream)
            await stream.aclose()
            return
        waiting = asyncio.ensure_future(anext(stream))
        began = steps[0]
        await asyncio.sleep(0)
        while steps[0] < began + after_steps:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    async def run() -> list[int]:
        beside = asyncio.ensure_future(collect(engine, ask(long_prompt[:30], tokens=200)))
        await asyncio.sleep(0)
        for after_steps in (0, 1, 3):
            await cancel(ask(long_prompt, tokens=4), after_steps=after_steps, after_events=0)
        for after_events in (1, 2, 4):
            await cancel(ask(long_prompt, tokens=4), after_steps=0, after_events=after_events)
        tokens, _ = await beside
        await pages.become_idle()
        return tokens

    assert asyncio.run(run()) == generate(unmodified, long_prompt[:30], 200)
    assert engine._open == 0


def test_a_deadline_ends_a_stream_and_frees_its_pages(engine: Engine) -> None:
    pages = Pages(engine)

    async def run() -> None:
        told = await events(engine, ask(random_prompt(360, 30), tokens=900, deadline_s=0.15))
        assert told[-1].finish == "error"
        assert told[-1].error is not None
        assert "deadline of 0.15 s passed after" in told[-1].error
        assert f"after {len(told) - 1} of up to 900 tokens" in told[-1].error
        assert len(told) > 1
        (never,) = await events(engine, ask(random_prompt(361, 30), deadline_s=0.0))
        assert never.finish == "error"
        tokens, last = await collect(engine, ask(random_prompt(362, 5), deadline_s=60.0))
        assert (len(tokens), last.finish) == (16, "length")
        await pages.become_idle()

    asyncio.run(run())


def test_the_steps_remaining_time_is_that_of_its_streams(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a remote call of the step may take."""
    meter = engine._meter
    seen: list[float | None] = []
    record_call = meter.record_call

    def noting(rows: NDArray[np.intp], result: RemoteResult, memory_gb: float) -> None:
        seen.append(meter.remaining_s(meter._began_at))
        record_call(rows, result, memory_gb)

    monkeypatch.setattr(meter, "record_call", noting)
    asyncio.run(collect(engine, ask([5, 6], tokens=2, deadline_s=30.0)))
    limited = seen.copy()
    seen.clear()
    asyncio.run(collect(engine, ask([5, 6], tokens=2)))
    assert limited
    assert all(remaining is not None and 25 < remaining <= 30 for remaining in limited)
    assert set(seen) == {None}
