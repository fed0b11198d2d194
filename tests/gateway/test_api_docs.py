"""docs/api.md says of each field what the code does with it."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.policy import HARMLESS_FIELDS, REFUSED_FIELDS
from gateway.requests import ChatRequest, CompletionRequest, GenerationFields, ResponseRequest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def told() -> dict[str, dict[str, str]]:
    """By endpoint, what the table says of each field."""
    rows = re.findall(
        r"^\| `(\w+)` \| (\w*) ?\| (\w*) ?\| (\w*) ?\|", PAGE.read_text("utf-8"), flags=re.MULTILINE
    )
    assert len({name for name, *_ in rows}) == len(rows) > 40
    return {
        endpoint: {name: said[number] for name, *said in rows if said[number]}
        for number, endpoint in enumerate(("chat", "completions", "responses"))
    }


def test_the_table_of_fields_is_true_and_complete() -> None:
    bodies: dict[str, type[GenerationFields]] = {
        "chat": ChatRequest,
        "completions": CompletionRequest,
        "responses": ResponseRequest,
    }
    for endpoint, body in bodies.items():
        done = dict.fromkeys(body.model_fields, "supported")
        done |= dict.fromkeys(REFUSED_FIELDS[endpoint], "refused")
        done |= dict.fromkeys(HARMLESS_FIELDS, "ignored")
        assert told()[endpoint] == done
