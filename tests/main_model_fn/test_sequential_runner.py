"""What models with recurrent layers are served by: in order, and as the other engine serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from main_model_fn.engine import Engine
from main_model_fn.loading import load_split_model
from remoe.checkpoint import Checkpoint
from remoe.errors import UnavailableError
from remoe.experts import Partition
from remoe.generation import SamplingParams
from tests.main_model_fn.asking import ask, collect, events, generate
from tests.main_model_fn.conftest import LIMITS
from tests.tiny_families import build_tiny_family
from tests.tiny_model import InProcessTransport, new_meter, reference


@pytest.fixture(scope="module")
def lfm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of convolution, attention, convolution."""
    folder = tmp_path_factory.mktemp("lfm2")
    return build_tiny_family(folder, "lfm2_moe", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def unmodified(lfm2_dir: Path) -> PreTrainedModel:
    return reference(lfm2_dir)


def open_engine(folder: Path) -> Engine:
    checkpoint = Checkpoint.open(folder)
    meter = new_meter(experts=checkpoint.experts, layers=checkpoint.layers)
    model = load_split_model(
        folder,
        partition=Partition(experts=4, remote=((), (1, 2), (0,))),
        dtype=torch.float32,
        device=torch.device("cpu"),
        transport=InProcessTransport(folder),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 0.5),
        meter=meter,
    )
    return Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test", recurrent=True)


@pytest.fixture(scope="module")
def engine(lfm2_dir: Path) -> Iterator[Engine]:
    engine = open_engine(lfm2_dir)
    engine.start()
    yield engine
    engine.stop()


PROMPT = [7, 3, 60, 22, 5]


def test_waiting_streams_give_generates_tokens(engine: Engine, unmodified: PreTrainedModel) -> None:
    prompts = [[*PROMPT, n] for n in range(2, 6)]  # 0 pads, and `generate` would not attend to it

    async def run() -> list[list[int]]:
        answers = await asyncio.gather(*(collect(engine, ask(prompt)) for prompt in prompts))
        return [tokens for tokens, _ in answers]

    assert asyncio.run(run()) == [generate(unmodified, prompt) for prompt in prompts]


def test_a_stop_token_ends_the_text(engine: Engine, unmodified: PreTrainedModel) -> None:
    expected = generate(unmodified, PROMPT)
    tokens, last = asyncio.run(collect(engine, ask(PROMPT, stop=(expected[5],))))
    assert last.finish == "stop"
    assert tokens == expected[: expected.index(expected[5])]


def test_sampling_is_that_of_the_other_engine(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.5, seed=9, logit_bias={4: -100.0}, top_k=30)
    request = ask(PROMPT, sampling=sampling)
    first, again = (asyncio.run(collect(engine, request))[0] for _ in range(2))
    assert first == again
    other = ask(PROMPT, sampling=SamplingParams(temperature=1.5, seed=10, top_k=30))
    assert asyncio.run(collect(engine, other))[0] != first


def test_a_prompt_can_be_scored_alone(engine: Engine, unmodified: PreTrainedModel) -> None:
    (event,) = asyncio.run(events(engine, ask(PROMPT, tokens=0, prompt_logprobs=2)))
    with torch.no_grad():
        rows = unmodified(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, PROMPT[1:], strict=False)]
    got = [entry.logprob for entry in event.prompt_logprobs if entry is not None]
    assert got == pytest.approx(expected, abs=1e-4)
    assert event.stats is not None
    assert event.stats.output_tokens == 0


def test_cancelled_streams_make_way(engine: Engine, unmodified: PreTrainedModel) -> None:
    """One at work, and one that still waits."""

    async def run() -> list[int]:
        working = engine.generate(ask(PROMPT, tokens=900))
        await anext(working)
        waiting = engine.generate(ask([1, 2], tokens=900))
        first_event = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0)
        behind = asyncio.ensure_future(collect(engine, ask(PROMPT)))
        await asyncio.sleep(0)
        first_event.cancel()
        await asyncio.wait([first_event])
        await working.aclose()
        return (await behind)[0]

    assert asyncio.run(asyncio.wait_for(run(), 20)) == generate(unmodified, PROMPT)
    assert engine._open == 0


def test_a_deadline_ends_a_stream_that_waits_too_long(engine: Engine) -> None:
    async def run() -> None:
        working = engine.generate(ask(PROMPT, tokens=900))
        await anext(working)
        (event,) = await events(engine, ask([1, 2], deadline_s=0.05))
        assert event.finish == "error"
        assert event.error is not None
        assert "deadline of 0.05 s passed after 0 of up to 16 tokens" in event.error
        await working.aclose()

    asyncio.run(run())


def test_stopping_leaves_no_stream_behind(lfm2_dir: Path) -> None:
    """Neither the one at work nor one that waits."""
    engine = open_engine(lfm2_dir)
    engine.start()

    async def run() -> None:
        request = ask(PROMPT, tokens=900)
        working = engine.generate(request)
        await anext(working)
        waiting = asyncio.ensure_future(events(engine, ask(PROMPT)))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        left = [event async for event in working]
        assert [left[-1].finish, (await waiting)[-1].finish] == ["error", "error"]
        assert not engine.alive
        with pytest.raises(UnavailableError):
            engine.check(request)

    asyncio.run(run())


def test_what_breaks_a_step_ends_the_engine(
    lfm2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(lfm2_dir)
    engine.start()
    monkeypatch.setattr("main_model_fn.steps.choose_token", None)
    (event,) = asyncio.run(events(engine, ask(PROMPT, sampling=SamplingParams())))
    assert event.finish == "error"
    engine.stop()
    assert not engine.alive
