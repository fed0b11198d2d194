"""Many streams through one model: transformers' continuous batching, request by request."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import structlog
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from main_model_fn.latent_cache import fit_latent_cache
from main_model_fn.metering import RequestMeter, StepMeter
from main_model_fn.step_hooks import SAMPLING, SEED, StepHooks
from remoe.errors import ContextLengthError, InvalidRequestError, QueueFullError, UnavailableError
from remoe.generation import FinishReason, GenerateEvent, GenerateRequest, GenerationStats

__all__ = ["Engine", "EngineLimits"]

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Sizes of the key-value cache and of a step, in tokens and requests."""

    kv_tokens: int
    page_tokens: int
    batch_tokens: int
    max_requests: int
    max_queue: int


class Engine:
    """Runs the model in a thread of its own; `generate` is called from the event loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        meter: StepMeter,
        *,
        limits: EngineLimits,
        deployment_plan_id: str,
    ) -> None:
        self._meter = meter
        self._limits = limits
        self.deployment_plan_id = deployment_plan_id
        self._vocab_size = int(model.config.vocab_size)
        self._open = 0
        fit_latent_cache(model)
        # The cache is sized explicitly: left alone, the engine measures for tens of seconds.
        self._manager: ContinuousBatchingManager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=limits.page_tokens,
                num_blocks=limits.kv_tokens // limits.page_tokens,
                max_batch_tokens=limits.batch_tokens,
                max_requests_per_batch=limits.max_requests,
                use_async_batching=False,
                use_cuda_graph=False,
            ),
        )
        self._manager.logit_processor = StepHooks(meter)

    def start(self) -> None:
        self._manager.start()

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    def check(self, request: GenerateRequest) -> None:
        """Raise what would make `generate` fail before its first event."""
        if not self.alive:
            raise UnavailableError("the engine has stopped; this replica is being replaced")
        if self._open >= self._limits.max_queue:
            raise QueueFullError(
                f"{self._open} requests are being served already; try again shortly",
                retry_after_s=1,
            )
        if not request.prompt_tokens or request.max_new_tokens < 1:
            raise InvalidRequestError("the prompt and the answer need at least one token each")
        if not all(0 <= token < self._vocab_size for token in request.prompt_tokens):
            raise InvalidRequestError(f"token ids must lie in 0 to {self._vocab_size - 1}")
        wanted = len(request.prompt_tokens) + request.max_new_tokens
        if wanted > self._limits.kv_tokens:
            raise ContextLengthError(
                f"{wanted} tokens of prompt and answer do not fit the key-value cache of "
                f"{self._limits.kv_tokens}; ask for fewer or raise REMOE_MAIN_KV_TOKENS"
            )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent]:
        """Yield new tokens as they come and a last event with the stats.

        Closing the iterator early cancels the request and frees its cache.
        """
        self.check(request)
        arrived_at = time.monotonic()
        # Clients choose request ids and may repeat them; the engine's own must be unique.
        engine_id = f"{request.request_id}-{secrets.token_hex(4)}"
        meter = self._meter.open(engine_id)
        self._open += 1
        try:
            async with aclosing(self._outputs(engine_id, request)) as outputs:
                async for event in _events(outputs, request, meter, arrived_at, self):
                    yield event
        finally:
            self._open -= 1
            self._meter.close(engine_id)

    async def _outputs(
        self, engine_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerationOutput]:
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        self._manager.register_result_handler(engine_id, outputs.put_nowait)
        seed = request.sampling.seed
        self._manager.add_request(
            request.prompt_tokens,
            request_id=engine_id,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            eos_token_id=request.stop_tokens,
            **{
                SAMPLING: request.sampling,
                SEED: secrets.randbits(62) if seed is None else seed,
            },
        )
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = output.is_finished()
                yield output
        finally:
            if not finished:
                self._manager.cancel_request(engine_id)
                # The library forgets a handler only when its request has finished.
                self._manager.output_router.result_handlers.pop(engine_id, None)

    def stats(
        self,
        request: GenerateRequest,
        meter: RequestMeter,
        *,
        arrived_at: float,
        first_token_at: float,
        output_tokens: int,
    ) -> GenerationStats:
        started_at = meter.first_step_at or first_token_at
        return GenerationStats(
            queue_s=started_at - arrived_at,
            first_token_s=first_token_at - arrived_at,
            total_s=time.monotonic() - arrived_at,
            prompt_tokens=len(request.prompt_tokens),
            output_tokens=output_tokens,
            deployment_plan_id=self.deployment_plan_id,
            ledger=meter.ledger,
            prefill_counts=meter.prefill_counts.tolist(),
            decode_counts=meter.decode_counts.tolist(),
        )


async def _events(
    outputs: AsyncIterator[GenerationOutput],
    request: GenerateRequest,
    meter: RequestMeter,
    arrived_at: float,
    engine: Engine,
) -> AsyncIterator[GenerateEvent]:
    sent = 0
    first_token_at: float | None = None
    async for output in outputs:
        if output.status == RequestStatus.FAILED:
            _log.error("generation_failed", request_id=request.request_id, error=output.error)
            yield GenerateEvent(finish="error", error="the main function failed on this request")
            return
        first_token_at = first_token_at or time.monotonic()
        tokens = output.generated_tokens
        finish: FinishReason | None = None
        if output.is_finished():
            finish = "stop" if tokens and tokens[-1] in request.stop_tokens else "length"
        # A stop token ends the text and is not part of it, but it was generated and is counted.
        visible = tokens[sent : len(tokens) - (finish == "stop")]
        sent += len(visible)
        stats = None
        if finish is not None or request.running_stats:
            stats = engine.stats(
                request,
                meter,
                arrived_at=arrived_at,
                first_token_at=first_token_at,
                output_tokens=len(tokens),
            )
        yield GenerateEvent(tokens=visible, finish=finish, stats=stats)
