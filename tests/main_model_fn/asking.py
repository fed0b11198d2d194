"""Asking an engine, and transformers' own `generate` to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from main_model_fn.engine import Engine
from main_model_fn.native_model import NativeModel
from main_model_fn.native_runner import NativeRunner
from main_model_fn.paged_runner import PagedRunner
from remoe.generation import GenerateEvent, GenerateRequest, SamplingParams
from tests.main_model_fn.conftest import LIMITS
from tests.tiny_model import VOCABULARY

GREEDY = SamplingParams(temperature=0)


def ask(
    prompt: list[int],
    *,
    tokens: int = 16,
    stop: tuple[int, ...] = (),
    sampling: SamplingParams = GREEDY,
    **more: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id="same-for-all",
        plan_id=None,
        prompt_tokens=prompt,
        max_new_tokens=tokens,
        stop_tokens=list(stop),
        sampling=sampling,
        **more,
    )


async def events(engine: Engine, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for event in engine.generate(request)]


async def collect(engine: Engine, request: GenerateRequest) -> tuple[list[int], GenerateEvent]:
    """All tokens, and the last event."""
    told = await events(engine, request)
    return [token for event in told for token in event.tokens], told[-1]


def random_prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def generate(model: PreTrainedModel, prompt: list[int], tokens: int = 16) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=-1
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


class Pages:
    """The key-value cache's pages: in use, kept for whoever shares a prefix, or free."""

    def __init__(self, engine: Engine) -> None:
        runner = engine._runner
        assert isinstance(runner, NativeRunner | PagedRunner)
        self._cache = _NativePages(runner) if isinstance(runner, NativeRunner) else _Blocks(runner)

    @property
    def used(self) -> int:
        return self._cache.used

    @property
    def kept(self) -> int:
        return self._cache.kept

    async def become_idle(self) -> None:
        """No request holds a page, and those not kept are free again.

        A last token is told before the step that freed its pages is over.
        """
        async with asyncio.timeout(10):
            while not self._cache.idle:  # noqa: ASYNC110
                await asyncio.sleep(0.002)


class _NativePages:
    def __init__(self, runner: NativeRunner) -> None:
        self._runner = runner

    @property
    def used(self) -> int:
        return self._runner.pages.used

    @property
    def kept(self) -> int:
        return self._runner.pages.kept

    @property
    def idle(self) -> bool:
        return not self._runner._running and not self._runner._waiting and self.used == 0


class _Blocks:
    """Of the library."""

    def __init__(self, runner: PagedRunner) -> None:
        assert runner._manager.batch_processor is not None
        self._processor = runner._manager.batch_processor

    @property
    def used(self) -> int:
        return len({page for table in self._tables() for page in table})

    @property
    def kept(self) -> int:
        return sum(len(one.ledger.cached_blocks) for one in self._allocators())

    @property
    def idle(self) -> bool:
        cache, scheduler = self._processor.cache, self._processor.scheduler
        kept = sum(
            len(one.ledger.cached_blocks) * one.bytes_per_block for one in self._allocators()
        )
        free = cache.compute_free_capacity(relative=False)
        whole = cache.num_sectors * cache.bytes_per_sector
        return (
            not scheduler.active_requests
            and not scheduler.waiting_requests
            and self.used == 0
            and free + kept == whole
        )

    def _allocators(self) -> list[Any]:
        return list(self._processor.cache.cache_allocators.values())

    def _tables(self) -> list[list[int]]:
        return [table for one in self._allocators() for table in list(one.block_table.values())]


@contextmanager
def serving(model: NativeModel | PreTrainedModel, meter: Any) -> Iterator[Engine]:
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float], Any]]:
    """Eight tokens to each prompt, all at once: tokens, log-probabilities, and routes counted."""

    async def together() -> Any:
        asked = (events(engine, ask(prompt, tokens=8, logprobs=0)) for prompt in prompts)
        return await asyncio.gather(*asked)

    return [
        (
            [token for event in told for token in event.tokens],
            [entry.logprob for event in told for entry in event.logprobs],
            (told[-1].stats.prefill_counts, told[-1].stats.decode_counts),
        )
        for told in asyncio.run(together())
    ]
