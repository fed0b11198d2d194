"""The engine as the service sees it: a request goes in, its events come out as they happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import copy
from typing import TYPE_CHECKING

from main_model_fn.guide import Guide, Guides
from main_model_fn.metering import StepMeter
from main_model_fn.native_model import NativeModel
from main_model_fn.native_runner import NativeRunner
from main_model_fn.runner import EngineLimits, Runner
from main_model_fn.stream import Stream
from remoe.errors import ContextLengthError, InvalidRequestError, QueueFullError, UnavailableError
from remoe.generation import (
    MAX_LOGPROBS,
    REPORT_PERIOD_S,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    GenerationStats,
)
from remoe.tracing import current_span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Engine", "EngineLimits"]


class Engine:
    """Admits requests and tells of them; a runner computes them in a thread of its own.

    `recurrent` models (remoe/families.py) are run one stream after another, others all at once.
    """

    def __init__(
        self,
        model: NativeModel | PreTrainedModel,
        meter: StepMeter,
        *,
        limits: EngineLimits,
        deployment_plan_id: str,
        recurrent: bool = False,
        guides: Guides | None = None,
    ) -> None:
        self._meter = meter
        self._limits = limits
        self.deployment_plan_id = deployment_plan_id
        self._open = 0
        self._guides = guides
        if isinstance(model, NativeModel):
            self._vocab_size = model.vocab_size
            self._runner: Runner = NativeRunner(model, meter, limits)
        else:
            self._vocab_size = int(model.config.vocab_size)
            self._runner = _library_runner(model, meter, limits, recurrent=recurrent)

    def start(self) -> None:
        self._runner.start()

    def stop(self) -> None:
        self._runner.stop()

    @property
    def alive(self) -> bool:
        return self._runner.alive

    def check(self, request: GenerateRequest) -> None:
        """Raise what would make `generate` fail before its first event."""
        if not self.alive:
            raise UnavailableError("the engine has stopped; this replica is being replaced")
        if self._open >= self._limits.max_queue:
            raise QueueFullError(
                f"{self._open} requests are being served already; try again shortly",
                retry_after_s=1,
            )
        least = 1 if request.prompt_logprobs is None else 0
        if not request.prompt_tokens or request.max_new_tokens < least:
            raise InvalidRequestError(
                "the prompt needs at least one token, and so does the answer unless the prompt's "
                "log-probabilities are asked for"
            )
        for top in (request.logprobs, request.prompt_logprobs):
            if top is not None and not 0 <= top <= min(MAX_LOGPROBS, self._vocab_size):
                raise InvalidRequestError(f"log-probabilities list 0 to {MAX_LOGPROBS} tokens")
        named = (*request.prompt_tokens, *request.sampling.logit_bias)
        if not all(0 <= token < self._vocab_size for token in named):
            raise InvalidRequestError(f"token ids must lie in 0 to {self._vocab_size - 1}")
        if request.grammar is not None and self._guides is None:
            raise InvalidRequestError("this model's tokenizer is not known here, nor any grammar")
        wanted = len(request.prompt_tokens) + request.max_new_tokens
        if wanted > self._limits.kv_tokens:
            raise ContextLengthError(
                f"{wanted} tokens of prompt and answer do not fit the key-value cache of "
                f"{self._limits.kv_tokens}; ask for fewer or raise REMOE_MAIN_KV_TOKENS"
            )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent]:
        """Yield new tokens as they come and a last event with the stats.

        Closing the iterator early cancels the request and frees its cache, and so does its
        deadline, with an error event.
        """
        self.check(request)
        arrived_at = time.monotonic()
        limit_s = request.deadline_s
        span = current_span()
        meter = self._meter.open(
            None if limit_s is None else arrived_at + limit_s,
            trace=span if span.traceparent else None,
        )
        stream = Stream(request, meter, await self._guide(request))
        self._open += 1
        self._runner.submit(stream)
        try:
            async with aclosing(self._events(stream, arrived_at)) as events:
                async for event in events:
                    yield event
        finally:
            self._open -= 1
            if not stream.ended:
                stream.ended = True
                self._runner.cancel(stream)

    async def _guide(self, request: GenerateRequest) -> Guide | None:
        if request.grammar is None or self._guides is None:
            return None
        return await asyncio.to_thread(
            self._guides.guide, request.grammar, tuple(request.stop_tokens)
        )

    async def _events(self, stream: Stream, arrived_at: float) -> AsyncGenerator[GenerateEvent]:
        request = stream.request
        sent = 0
        first_token_at: float | None = None
        finish: FinishReason | None = None
        while finish is None:
            try:
                news = await stream.news(REPORT_PERIOD_S)
            except TimeoutError:
                yield _failed(
                    stream,
                    f"the deadline of {request.deadline_s:g} s passed after {sent} of up to "
                    f"{request.max_new_tokens} tokens; allow more time or ask for fewer",
                )
                return
            if news is None:
                yield GenerateEvent(ledger=copy(stream.meter.ledger))
                continue
            count, finish = news
            if finish == "error":
                yield _failed(stream, "the main function failed on this request")
                return
            prompt_logprobs = [] if first_token_at else stream.prompt_logprobs
            first_token_at = first_token_at or time.monotonic()
            # A stop token ends the text and is not part of it, but was generated and counts.
            end = min(count - (finish == "stop"), request.max_new_tokens)
            stats = None
            if finish is not None or request.running_stats:
                stats = self._stats(
                    stream,
                    arrived_at=arrived_at,
                    first_token_at=first_token_at,
                    output_tokens=min(count, request.max_new_tokens),
                )
            yield GenerateEvent(
                tokens=stream.tokens[sent:end],
                logprobs=stream.logprobs[sent:end],
                prompt_logprobs=prompt_logprobs,
                finish=finish,
                stats=stats,
                # The engine's thread goes on adding to its own.
                ledger=copy(stream.meter.ledger) if stats is None else None,
            )
            sent = end

    def _stats(
        self, stream: Stream, *, arrived_at: float, first_token_at: float, output_tokens: int
    ) -> GenerationStats:
        meter = stream.meter
        started_at = meter.first_step_at or first_token_at
        return GenerationStats(
            queue_s=started_at - arrived_at,
            first_token_s=first_token_at - arrived_at,
            total_s=time.monotonic() - arrived_at,
            prompt_tokens=len(stream.request.prompt_tokens),
            output_tokens=output_tokens,
            deployment_plan_id=self.deployment_plan_id,
            ledger=meter.ledger,
            prefill_counts=meter.prefill_counts.tolist(),
            decode_counts=meter.decode_counts.tolist(),
        )


def _library_runner(
    model: PreTrainedModel, meter: StepMeter, limits: EngineLimits, *, recurrent: bool
) -> Runner:
    # Imported for library models alone: they bring transformers, which takes seconds.
    from main_model_fn.library_scoring import library_scorer
    from main_model_fn.paged_runner import PagedRunner
    from main_model_fn.sequential_runner import SequentialRunner
    from main_model_fn.steps import Steps

    runner = SequentialRunner if recurrent else PagedRunner
    return runner(model, Steps(library_scorer(model), meter), limits)


def _failed(stream: Stream, error: str) -> GenerateEvent:
    return GenerateEvent(finish="error", error=error, ledger=copy(stream.meter.ledger))
