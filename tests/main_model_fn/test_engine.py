"""The engine against `generate`: same tokens alone and in company."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from main_model_fn.engine import Engine
from remoe.errors import (
    ContextLengthError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from remoe.generation import GenerateEvent, GenerateRequest, SamplingParams
from tests.main_model_fn.asking import Pages, ask, collect, events, generate, random_prompt
from tests.main_model_fn.conftest import LIMITS
from tests.tiny_model import VOCABULARY, InProcessTransport, new_meter, split


def test_concurrent_streams_give_generates_tokens(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    # Longer than one step's 64 tokens: prefilled in pieces, beside others that decode.
    prompts = [random_prompt(seed, length) for seed, length in enumerate((3, 150, 20, 64, 7))]

    async def run() -> list[tuple[list[int], GenerateEvent]]:
        return await asyncio.gather(*(collect(engine, ask(prompt)) for prompt in prompts))

    for prompt, (tokens, last) in zip(prompts, asyncio.run(run()), strict=True):
        assert tokens == generate(unmodified, prompt)
        assert last.finish == "length"
        assert last.stats is not None
        assert last.stats.output_tokens == 16
        # Every token but the last generated one passes each layer once, with two routes.
        prefill, decode = (
            torch.tensor(c) for c in (last.stats.prefill_counts, last.stats.decode_counts)
        )
        assert prefill.sum(1).tolist() == [2 * len(prompt)] * 3
        assert decode.sum(1).tolist() == [2 * 15] * 3
        assert last.stats.ledger.remote_calls > 0
        assert last.stats.ledger.main_cpu_gb_s > 0
        assert last.stats.first_token_s <= last.stats.total_s


def test_a_stop_token_ends_the_text_and_is_not_sent(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    prompt = random_prompt(11, 6)
    expected = generate(unmodified, prompt)
    stop = expected[9]
    tokens, last = asyncio.run(collect(engine, ask(prompt, stop=(stop,))))
    assert last.finish == "stop"
    assert tokens == expected[: expected.index(stop)]
    assert last.stats is not None
    assert last.stats.output_tokens == len(tokens) + 1


def test_a_seeded_sample_is_the_same_whatever_shares_the_batch(engine: Engine) -> None:
    seeded = ask(random_prompt(5, 8), sampling=SamplingParams(temperature=1.2, top_p=0.95, seed=42))
    hot = SamplingParams(temperature=2.0)

    async def in_company() -> list[int]:
        others = [collect(engine, ask(random_prompt(n, 30), sampling=hot)) for n in range(4)]
        results = await asyncio.gather(collect(engine, seeded), *others)
        return results[0][0]

    alone, _ = asyncio.run(collect(engine, seeded))
    assert asyncio.run(in_company()) == alone
    unseeded = ask(random_prompt(5, 8), sampling=SamplingParams(temperature=1.2, top_p=0.95))
    draws = [asyncio.run(collect(engine, unseeded))[0] for _ in range(3)]
    assert any(draw != alone for draw in draws)


def test_closing_the_stream_frees_the_cache(engine: Engine) -> None:
    pages = Pages(engine)

    async def abandon() -> None:
        stream = engine.generate(ask(random_prompt(1, 50), tokens=400))
        await anext(stream)
        assert pages.used > 0
        await stream.aclose()
        await pages.become_idle()

    asyncio.run(abandon())
    assert engine._open == 0


def test_running_stats_come_with_every_event(engine: Engine) -> None:
    request = msgspec.structs.replace(ask(random_prompt(2, 5), tokens=4), running_stats=True)

    told = asyncio.run(events(engine, request))
    counted = [event.stats.output_tokens for event in told if event.stats]
    assert counted == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask([]), InvalidRequestError),
        (ask([1], tokens=0), InvalidRequestError),
        (ask([VOCABULARY]), InvalidRequestError),
        (ask([1], sampling=SamplingParams(logit_bias={VOCABULARY: 1.0})), InvalidRequestError),
        (ask([-1]), InvalidRequestError),
        (ask([1] * 1000, tokens=100), ContextLengthError),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    engine: Engine, request_: GenerateRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.check(request_)


def test_a_full_queue_says_so(engine: Engine) -> None:
    async def fill() -> None:
        streams = [engine.generate(ask([n + 1], tokens=200)) for n in range(LIMITS.max_queue)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        try:
            with pytest.raises(QueueFullError):
                engine.check(ask([1]))
        finally:
            for stream in streams:
                await stream.aclose()

    asyncio.run(fill())


def small_engine(tiny_model_dir: Path) -> Engine:
    meter = new_meter()
    model = split(tiny_model_dir, ((), (), ()), InProcessTransport(tiny_model_dir), meter)
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    return engine


def test_every_event_says_what_has_been_used_and_silence_is_filled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("main_model_fn.engine.REPORT_PERIOD_S", 1e-6)
    *before, last = asyncio.run(events(engine, ask([1, 2, 3], tokens=64)))
    assert last.stats is not None
    assert last.ledger is None
    used = [event.ledger.main_cpu_gb_s for event in before if event.ledger is not None]
    assert len(used) == len(before)
    assert used == sorted(used)
    assert 0 < used[-1] <= last.stats.ledger.main_cpu_gb_s
    assert [] in [event.tokens for event in before]
    assert sum(len(event.tokens) for event in [*before, last]) == 64


def test_stopping_leaves_no_stream_behind(tiny_model_dir: Path) -> None:
    engine = small_engine(tiny_model_dir)

    async def run() -> None:
        working = engine.generate(ask([1, 2], tokens=900))
        await anext(working)
        await asyncio.to_thread(engine.stop)
        left = [event async for event in working]
        assert left[-1].finish == "error"
        assert not engine.alive
        with pytest.raises(UnavailableError):
            engine.check(ask([1]))

    asyncio.run(run())


def test_what_breaks_a_step_ends_the_engine_and_all_streams_with_it(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny_model_dir)

    async def run() -> None:
        working = engine.generate(ask([1, 2], tokens=900))
        await anext(working)
        monkeypatch.setattr("main_model_fn.steps.choose_token", None)
        (event,) = await events(engine, ask([3], sampling=SamplingParams()))
        assert event.finish == "error"
        left = [event async for event in working]
        assert left[-1].finish == "error"

    asyncio.run(run())
    engine.stop()
    assert not engine.alive


def test_tokens_for_a_loop_that_is_gone_harm_nobody(
    engine: Engine, unmodified: PreTrainedModel
) -> None:
    """A client's loop may end while the engine is in the middle of its step."""

    async def leave() -> None:
        await anext(engine.generate(ask([1, 2], tokens=900)))

    for _ in range(5):
        asyncio.run(leave())
    assert engine.alive
    prompt = random_prompt(12, 4)
    assert asyncio.run(collect(engine, ask(prompt)))[0] == generate(unmodified, prompt)
    asyncio.run(Pages(engine).become_idle())
