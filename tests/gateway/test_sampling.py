"""Where a request's sampling comes from: itself, then the model's makers, then OpenAI."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.requests import CompletionRequest
from gateway.sampling import SamplingDefaults, sampling_params
from gateway.text import TextModel
from remoe.generation import SamplingParams
from tests.gateway.tiny_text import write_model


def sampled(body: dict[str, object], defaults: SamplingDefaults) -> SamplingParams:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "p", **body})
    return sampling_params(request, defaults, sample=0, vocab_size=100)


def test_openais_defaults_without_a_recommendation() -> None:
    assert sampled({}, SamplingDefaults()) == SamplingParams()


def test_what_is_left_out_comes_from_the_model_and_what_is_said_wins() -> None:
    defaults = SamplingDefaults(temperature=0.2, top_p=0.9, repetition_penalty=1.1)
    got = sampled({"temperature": 1.0}, defaults)
    assert got == SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    assert sampled({"temperature": None, "repetition_penalty": 1.0}, defaults).temperature == 0.2
    assert sampled({"top_p": 0}, defaults).top_k == 1


def test_the_recommendation_is_read_from_the_model_folder(tmp_path: Path) -> None:
    write_model(tmp_path)
    recommended = {"eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    text = TextModel.load(tmp_path)
    assert sampled({}, text.sampling) == SamplingParams(temperature=0.6, top_k=20)
    assert text.stop_tokens == (2,)
