"""Asking a model: passes one by one, as accelerate's users run them, or the engine that serves."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from bench.heterogeneous.results import Results
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.metering import StepMeter
from remoe.generation import GenerateRequest, SamplingParams

__all__ = ["Asking", "Serving", "measure"]

_PROMPT = 32
_LEARNING = 24  # tokens, until steps are shared out as the machine wants it
_LIMITS = EngineLimits(
    kv_tokens=4096, page_tokens=32, batch_tokens=256, max_requests=16, max_queue=64
)


class Asking:
    """Times a model; never longer than `limit_s` at one figure, but for what is under way."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, limit_s: float, *, threads: int = 1
    ) -> None:
        self._threads = threads  # torch's, for prompts: Remoe's own leave it one
        self._model = model
        self._device = device
        self._limit_s = limit_s
        self._generator = torch.Generator().manual_seed(0)

    def _tokens(self, count: int) -> torch.Tensor:
        vocabulary = self._model.config.vocab_size
        found = torch.randint(vocabulary, (1, count), generator=self._generator)
        return found.to(self._device)

    def _forward(self, tokens: torch.Tensor, cache: DynamicCache) -> None:
        logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())  # as a server has to: waits for it

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    @torch.no_grad()
    def decode_s(self, most: int = 64) -> list[float]:
        """Seconds of each of some tokens after a prompt, and 4 more to warm up."""
        cache, took = self._cache(), list[float]()
        self._forward(self._tokens(32), cache)
        began = time.perf_counter()
        for count in range(most + 4):
            token = self._tokens(1)
            before = time.perf_counter()
            self._forward(token, cache)
            after = time.perf_counter()
            if count >= 4 or after - began > self._limit_s / 2:
                took.append(after - before)
            if after - began > self._limit_s and took:
                break
        return took

    @torch.no_grad()
    def prefill_s(self, length: int, most: int = 4) -> list[float]:
        """Seconds of reading a prompt, after one to warm up if there is time for it."""
        torch.set_num_threads(self._threads)
        took, began = list[float](), time.perf_counter()
        while len(took) < most + 1 and (not took or time.perf_counter() - began < self._limit_s):
            tokens, cache = self._tokens(length), self._cache()
            before = time.perf_counter()
            self._forward(tokens, cache)
            took.append(time.perf_counter() - before)
        torch.set_num_threads(1)
        return took[1:] or took


@dataclass
class Serving:
    """An engine over the model, as the main function runs it."""

    model: PreTrainedModel
    meter: StepMeter

    def decode_s(self, most: int = 64) -> list[float]:
        """Seconds from one token of a stream to the next, after some to warm up."""
        engine = Engine(self.model, self.meter, limits=_LIMITS, deployment_plan_id="bench")
        engine.start()
        try:
            return asyncio.run(self._ask(engine, most))
        finally:
            engine.stop()

    async def _ask(self, engine: Engine, most: int) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.model.config.vocab_size, (_PROMPT,), generator=generator)
        request = GenerateRequest(
            request_id="bench",
            plan_id=None,
            prompt_tokens=prompt.tolist(),
            max_new_tokens=most + _LEARNING,
            stop_tokens=[],
            sampling=SamplingParams(temperature=0),
        )
        took, last = list[float](), None
        async for event in engine.generate(request):
            if event.error is not None:
                raise RuntimeError(event.error)
            now = time.perf_counter()
            if event.tokens and last is not None:
                took.extend([(now - last) / len(event.tokens)] * len(event.tokens))
            last = now if event.tokens else last
        return took[_LEARNING - 1 :]


def measure(
    results: Results,
    names: dict[str, Any],
    decode_s: Callable[[], list[float]],
    prefill_s: Callable[[int], list[float]],
    computed: Counter[str] | None = None,
    *,
    prefills: tuple[int, ...],
    before: Callable[[], bool],
) -> None:
    """All figures of one contender, decoding first; `computed` counts experts by place."""

    def shares() -> dict[str, float]:
        if computed is None:
            return {}
        total = sum(computed.values()) or 1
        found = {f"share_{k}": round(v / total, 3) for k, v in computed.items()}
        computed.clear()
        return found

    if not before():
        return
    shares()
    took = decode_s()
    results.add(
        **names,
        what="decode",
        tokens_per_s=1 / statistics.median(took),
        mean_tokens_per_s=len(took) / sum(took),
        samples=len(took),
        **shares(),
    )
    for length in prefills:
        if not before():
            return
        took = prefill_s(length)
        results.add(
            **names,
            what=f"prefill {length}",
            seconds=statistics.median(took),
            samples=len(took),
            **shares(),
        )
