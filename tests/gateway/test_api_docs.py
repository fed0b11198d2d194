"""docs/api.md says of each field what the code does with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gateway.app  # noqa: F401  # with all of its errors
from gateway.policy import HARMLESS_FIELDS, REFUSED_FIELDS
from gateway.requests import ChatRequest, CompletionRequest, GenerationFields, ResponseRequest
from remoe.errors import CheckpointError, RemoeError, SettingsError

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


def errors_of(kind: type[RemoeError]) -> Iterator[type[RemoeError]]:
    """Every kind that the gateway's own code and what it shares with others can raise."""
    for found in kind.__subclasses__():
        if found.__module__.startswith(("gateway.", "remoe.errors", "remoe.accounts.")):
            yield found
        yield from errors_of(found)


def test_the_table_of_errors_is_true_and_complete() -> None:
    section = PAGE.read_text("utf-8").split("## Errors")[1].split("\n## ")[0]
    told = {
        code: (statuses.split(", "), retried.startswith("yes"))
        for statuses, codes, retried in re.findall(
            r"^\| ([\d, ]+) \| (.*?) \| \w+ \| (.*?) \|$", section, flags=re.MULTILINE
        )
        for code in re.findall(r"`(\w+)`", codes)
    }
    known = set(errors_of(RemoeError)) - {CheckpointError, SettingsError}  # of starting programs
    assert {error.code for error in known} == set(told)
    for error in known:
        statuses, retried = told[error.code]
        assert str(error.status) in statuses, error
        assert retried == error.retryable, error
