"""Checks on what other services send; every error says what to change."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from planner.model import ModelFacts
from remoe.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from remoe.plan import Observation, PlanRequest

__all__ = ["MOST_STREAMS", "check_observation", "check_plan_request"]

MOST_STREAMS = 65_536


def check_plan_request(request: PlanRequest, model: ModelFacts) -> None:
    """Raise the RemoeError that says why a request cannot be planned."""
    if request.model != model.name:
        raise ModelNotFoundError(
            f"The model {request.model!r} does not exist here; this deployment serves "
            f"{model.name!r}.",
            param="model",
        )
    _check_tokens(request.prompt_tokens, model)
    if request.max_new_tokens < 1:
        raise InvalidRequestError(
            f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.",
            param="max_new_tokens",
        )
    if request.streams is not None and not 1 <= request.streams <= MOST_STREAMS:
        raise InvalidRequestError(
            f"streams is {request.streams}; it must be 1 to {MOST_STREAMS}.", param="streams"
        )
    slo = request.slo
    if slo is not None and not (slo.ttft_s > 0 and slo.tpot_s > 0):
        raise InvalidRequestError("slo.ttft_s and slo.tpot_s must be above 0.", param="slo")


def _check_tokens(tokens: list[int], model: ModelFacts) -> None:
    if not tokens:
        raise InvalidRequestError(
            "prompt_tokens is empty; send at least one token.", param="prompt_tokens"
        )
    if len(tokens) > model.context_length:
        raise ContextLengthError(
            f"The prompt has {len(tokens)} tokens, and the model's context is "
            f"{model.context_length}; shorten it.",
            param="prompt_tokens",
        )
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= model.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"prompt_tokens[{tokens.index(wrong)}] is {wrong}, outside the vocabulary "
            f"(0 to {model.vocab_size - 1}); was another model's tokenizer used?",
            param="prompt_tokens",
        )


def check_observation(
    observation: Observation, model: ModelFacts
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the prefill and decode counts, int64 [layers, experts], or raise."""
    if observation.model_digest != model.digest:
        raise InvalidRequestError(
            f"The observation is of the model {observation.model_digest}, but this planner's is "
            f"{model.digest}; restart the services that run the other one.",
            param="model_digest",
        )
    _check_tokens(observation.prompt_tokens, model)
    times = {
        "ttft_s": observation.ttft_s,
        "tpot_s": observation.tpot_s or 0.0,
        "cold_start_s": observation.cold_start_s,
    }
    for name, value in times.items():
        # JSON's 1e999 is read as infinity.
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequestError(
                f"{name} is {value}; it must be a finite number, 0 or above.", param=name
            )
    return (
        _counts("prefill_counts", observation.prefill_counts, model),
        _counts("decode_counts", observation.decode_counts, model),
    )


def _counts(name: str, rows: list[list[int]], model: ModelFacts) -> NDArray[np.int64]:
    shape = (model.layers, model.experts)
    # Checked before numpy sees them: rows of unequal length make no array.
    if len(rows) != model.layers or any(len(row) != model.experts for row in rows):
        raise InvalidRequestError(
            f"{name} must be {shape[0]} layers of {shape[1]} counts each.", param=name
        )
    if any(not 0 <= count < 2**31 for row in rows for count in row):
        raise InvalidRequestError(f"{name} holds a number that is no count.", param=name)
    for layer, row in enumerate(rows):
        if layer not in model.moe_layers and any(row):
            raise InvalidRequestError(
                f"{name} counts routes in layer {layer}; layer {layer} has no experts.", param=name
            )
    return np.asarray(rows, dtype=np.int64).reshape(shape)
