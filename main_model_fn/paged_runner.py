"""Many streams at once: transformers' continuous batching over a paged key-value cache.

It lets us in at three points. The list of logits processors sees every batch before its forward
pass and its logits after: there the streams are metered and their tokens chosen and delivered,
step by step (steps.py). What would then choose tokens takes those. The scheduler decides what is
computed: ours computes every row of a prompt whose tokens are to be scored.
"""

from __future__ import annotations

import structlog
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from main_model_fn.graphed_decoder import GraphedDecoder
from main_model_fn.host_inputs import keep_inputs_on_host
from main_model_fn.latent_cache import fit_latent_cache
from main_model_fn.runner import EngineLimits
from main_model_fn.steps import Part, Steps
from main_model_fn.stream import Stream

__all__ = ["PagedRunner"]

_log = structlog.get_logger()
# The name under which a stream travels in the library's per-request keyword arguments.
_STREAM = "remoe_stream"


class PagedRunner:
    """Runs all streams together, a step at a time, with complete pages of equal prefixes shared."""

    def __init__(self, model: PreTrainedModel, steps: Steps, limits: EngineLimits) -> None:
        fit_latent_cache(model)
        # The cache is sized explicitly: left alone, the library measures for tens of seconds.
        self._manager: ContinuousBatchingManager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=limits.page_tokens,
                num_blocks=limits.kv_tokens // limits.page_tokens,
                max_batch_tokens=limits.batch_tokens,
                max_requests_per_batch=limits.max_requests,
                scheduler_type=_Scheduler.NAME,
                allow_block_sharing=True,
                use_async_batching=False,
                use_cuda_graph=False,
            ),
        )
        self._manager.logit_processor = hooks = _Hooks(steps)
        self._manager.output_router = _Router()
        create = self._manager._create_batch_processor  # noqa: SLF001  # in its thread, on start

        def created() -> ContinuousBatchProcessor:
            processor = create()
            processor.model_runner._sample = hooks.sample  # noqa: SLF001
            if isinstance(model.base_model.forward, GraphedDecoder):
                keep_inputs_on_host(processor)
            return processor

        self._manager._create_batch_processor = created  # noqa: SLF001

    def start(self) -> None:
        self._manager.start()

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    def submit(self, stream: Stream) -> None:
        taken = self._manager.add_request(
            stream.request.prompt_tokens,
            request_id=stream.engine_id,
            max_new_tokens=stream.max_new_tokens,
            eos_token_id=stream.request.stop_tokens,
            **{_STREAM: stream},
        )
        if taken is None:  # its thread is ending
            stream.fail()

    def cancel(self, stream: Stream) -> None:
        self._manager.cancel_request(stream.engine_id)


def _stream(state: RequestState) -> Stream:
    stream: Stream = state.logit_processor_kwargs[_STREAM]
    return stream


class _Hooks(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """The library's view of `Steps`."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(LogitsProcessorList())
        self._steps = steps
        self._tokens: list[int] = []
        self.do_processing = True

    def check_kwargs(self, kwargs: dict[str, object]) -> None:
        """Every request brings its stream and nothing else."""
        if set(kwargs) != {_STREAM}:
            raise ValueError(f"unexpected arguments {sorted(kwargs)}")

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Called with the batch in row order, just before its forward pass."""
        self._steps.begin(
            [
                Part(
                    stream=_stream(future.state),
                    # By now the library has moved its own count past these rows.
                    position=future.state.position_offset - future.query_length,
                    rows=future.query_length,
                    yields_token=future.has_new_token,
                )
                for future in requests_in_batch
            ]
        )
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """Choose each request's next token by its row of `scores` [new tokens, vocab]."""
        self._tokens = self._steps.end(scores)
        return scores

    def sample(self, _scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In place of the library's: put the chosen tokens where it looks for them."""
        output_ids[0, : len(self._tokens)] = torch.tensor(self._tokens, dtype=output_ids.dtype)


class _Router(OutputRouter):  # type: ignore[misc]
    """Takes the library's outputs. Tokens have left by the hooks; only a failure is news."""

    def deliver(self, output: GenerationOutput) -> None: ...

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None: ...

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        _log.error("generation_failed", request_id=state.request_id, error=repr(error))
        _stream(state).fail()


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """The library's own, but that a prompt to be scored shares no pages: its rows are needed."""

    NAME = "remoe"

    def _infer_request_tokens(self, state: RequestState, removed: set[str]) -> list[int]:
        if state.status == RequestStatus.PENDING and _stream(state).prompt_logprobs:
            tokens: list[int] = state.remaining_prefill_tokens
            return tokens
        inferred: list[int] = super()._infer_request_tokens(state, removed)
        return inferred


SCHEDULER_MAPPING[_Scheduler.NAME] = _Scheduler
