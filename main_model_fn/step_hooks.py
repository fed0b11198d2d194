"""Where continuous batching lets us in: once before and once after each forward pass.

transformers hands a list of logits processors every batch it is about to run, and then the
logits. Subclassing that list gives the metering its batch layout and every request its own
sampling, without touching the engine.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from main_model_fn.metering import Span, StepMeter
from main_model_fn.sampling import perturb
from remoe.generation import SamplingParams

__all__ = ["SAMPLING", "SEED", "StepHooks"]

# Names under which a request's sampling travels in the engine's per-request keyword arguments.
SAMPLING = "remoe_sampling"
SEED = "remoe_seed"


class _Sampled(NamedTuple):
    """A row that yields a token: whose parameters it goes by, and what it has said so far."""

    params: SamplingParams
    seed: int
    generated: list[int]


class StepHooks(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Meters each step and samples each request by its own parameters."""

    def __init__(self, meter: StepMeter) -> None:
        super().__init__(LogitsProcessorList())
        self._meter = meter
        self._sampled: list[_Sampled] = []
        self.do_processing = True

    def check_kwargs(self, kwargs: dict[str, object]) -> None:
        """Every request brings exactly the two arguments above."""
        if set(kwargs) != {SAMPLING, SEED}:
            raise ValueError(f"unexpected sampling arguments {sorted(kwargs)}")

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Called with the batch in row order, just before its forward pass."""
        spans = [
            Span(
                request_id=future.state.request_id,
                rows=future.query_length,
                prefill=not future.state.generated_tokens,
            )
            for future in requests_in_batch
        ]
        self._sampled = [
            _Sampled(
                future.state.logit_processor_kwargs[SAMPLING],
                future.state.logit_processor_kwargs[SEED],
                future.state.generated_tokens,
            )
            for future in requests_in_batch
            if future.has_new_token
        ]
        self._meter.begin_step(spans, time.monotonic())
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """Scores [new tokens, vocab] whose row-wise argmax is each request's next token."""
        # A prompt prefilled in pieces has no new token yet, and leaves a meaningless row at the end.
        rows = [
            perturb(
                logits,
                sampled.params,
                seed=sampled.seed,
                generated=sampled.generated,
            )
            for logits, sampled in zip(scores, self._sampled, strict=False)
        ]
        self._meter.end_step(time.monotonic())
        return torch.cat([torch.stack(rows), scores[len(rows) :]]) if rows else scores
