"""The gateway against its own OpenAPI document: whatever it says may be sent gets no 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator

from tests.gateway.conftest import Stack

MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_document_of_ours_makes_a_500(stack: Stack, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{stack.url}/openapi.json")
    operation = schema[path][method]
    error = Draft202012Validator(
        {
            **schema.raw_schema["components"]["schemas"]["Error"],
            "components": schema.raw_schema["components"],
        }
    )

    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES]))
    def run(case: Any) -> None:
        reply = case.call()
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert error.is_valid(json.loads(reply.content)), reply.text

    run()
