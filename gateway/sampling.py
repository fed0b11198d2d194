"""Sampling fields of a request as the main function takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from gateway.requests import GenerationFields
from remoe.errors import InvalidRequestError
from remoe.generation import SamplingParams

__all__ = ["SamplingDefaults", "sampling_params"]

_Value = TypeVar("_Value", int, float)


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a model's makers recommend, from its generation_config.json; None where they do not."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_params(
    request: GenerationFields, defaults: SamplingDefaults, *, sample: int, vocab_size: int
) -> SamplingParams:
    """The parameters of the `sample`-th answer, counted from 0, to one prompt."""
    given = request.model_fields_set

    def settled(name: str, own: _Value, recommended: _Value | None) -> _Value:
        return own if name in given or recommended is None else recommended

    top_p = settled("top_p", request.top_p, defaults.top_p)
    top_k = settled("top_k", request.top_k, defaults.top_k)
    # top_p 0 keeps only the most likely token; as a probability mass it would keep none.
    greedy = top_p == 0
    return SamplingParams(
        temperature=settled("temperature", request.temperature, defaults.temperature),
        top_p=1.0 if greedy else top_p,
        top_k=1 if greedy else max(top_k, 0),
        min_p=settled("min_p", request.min_p, defaults.min_p),
        repetition_penalty=settled(
            "repetition_penalty", request.repetition_penalty, defaults.repetition_penalty
        ),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias, vocab_size),
        seed=None if request.seed is None else _derived_seed(request.seed, sample),
    )


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and int(key[:12]) < vocab_size):
            raise InvalidRequestError(
                f"'logit_bias' maps token ids to numbers; '{key[:40]}' is not a token id from 0 "
                f"to {vocab_size - 1}.",
                param="logit_bias",
            )
        checked[int(key)] = bias
    return checked


def _derived_seed(seed: int, sample: int) -> int:
    """The seed itself for the first sample, an unrelated 63-bit one for each further sample."""
    if sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
