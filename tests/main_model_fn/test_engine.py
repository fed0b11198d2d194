"""The engine against `generate`: same tokens alone and in company."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.metering import StepMeter
from remoe.errors import ContextLengthError, InvalidRequestError, QueueFullError
from remoe.generation import GenerateEvent, GenerateRequest, SamplingParams
from tests.tiny_model import VOCABULARY, InProcessTransport, new_meter, reference, split

GREEDY = SamplingParams(temperature=0)
LIMITS = EngineLimits(kv_tokens=1024, page_tokens=16, batch_tokens=64, max_requests=8, max_queue=8)


@pytest.fixture(scope="module")
def unmodified(tiny_model_dir: Path) -> PreTrainedModel:
    return reference(tiny_model_dir)


@pytest.fixture(scope="module")
def meter() -> StepMeter:
    return new_meter()


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path, meter: StepMeter) -> Iterator[Engine]:
    remote = ((0, 1), (2, 3), (0, 3))
    model = split(tiny_model_dir, remote, InProcessTransport(tiny_model_dir), meter)
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    yield engine
    engine.stop()


def ask(
    prompt: list[int],
    *,
    tokens: int = 16,
    stop: tuple[int, ...] = (),
    sampling: SamplingParams = GREEDY,
) -> GenerateRequest:
    return GenerateRequest(
        request_id="same-for-all",
        plan_id=None,
        prompt_tokens=prompt,
        max_new_tokens=tokens,
        stop_tokens=list(stop),
        sampling=sampling,
    )


async def collect(engine: Engine, request: GenerateRequest) -> tuple[list[int], GenerateEvent]:
    tokens: list[int] = []
    last = GenerateEvent()
    async for event in engine.generate(request):
        tokens += event.tokens
        last = event
    return tokens, last


def random_prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def generate(model: PreTrainedModel, prompt: list[int], tokens: int = 16) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=-1
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


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
    manager = engine._manager
    assert manager.batch_processor is not None
    cache = manager.batch_processor.cache

    async def abandon() -> None:
        stream = engine.generate(ask(random_prompt(1, 50), tokens=400))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(10):
            while manager.batch_processor.scheduler.active_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    free_before = cache.compute_free_capacity()
    asyncio.run(abandon())
    assert cache.compute_free_capacity() == free_before
    assert engine._open == 0
    assert not manager.output_router.result_handlers


def test_running_stats_come_with_every_event(engine: Engine) -> None:
    request = msgspec.structs.replace(ask(random_prompt(2, 5), tokens=4), running_stats=True)

    async def events() -> list[GenerateEvent]:
        return [event async for event in engine.generate(request)]

    counted = [event.stats.output_tokens for event in asyncio.run(events()) if event.stats]
    assert counted == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask([]), InvalidRequestError),
        (ask([1], tokens=0), InvalidRequestError),
        (ask([VOCABULARY]), InvalidRequestError),
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
