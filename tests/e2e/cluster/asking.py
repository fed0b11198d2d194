"""Greedy answers, streamed, with the times at which their pieces came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

from tests.e2e.cluster.kubernetes import Cluster

__all__ = ["LONG_PROMPT", "LONG_TOKENS", "PROMPTS", "TOKENS", "Answer", "answer", "asked"]

PROMPTS = (
    "What is the capital of France, and why is it famous?",
    "Write a short poem about the sea.",
    "Explain in two sentences how a bicycle stays upright.",
    "def fibonacci(n):",
)

TOKENS = 24

# An answer that lasts while something happens to the cluster.
LONG_PROMPT = "Write a long story about a lighthouse keeper and his daughter."
LONG_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens` are text by token as they came; `x_remoe` is the receipt of the last event."""

    text: str
    first_s: float
    total_s: float
    finish: str | None
    x_remoe: dict[str, Any]


def answer(
    client: openai.OpenAI,
    prompt: str,
    *,
    tokens: int = TOKENS,
    on_piece: Callable[[int], None] = lambda count: None,
) -> Answer:
    """Stream one greedy chat answer; `on_piece` is told how many pieces have come so far."""
    began = time.monotonic()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, pieces, first_s, finish = "", 0, 0.0, None
    x_remoe: dict[str, Any] = {}
    for event in stream:
        if event.choices:
            finish = event.choices[0].finish_reason or finish
            piece = event.choices[0].delta.content
            if piece:
                first_s = first_s or time.monotonic() - began
                text += piece
                pieces += 1
                on_piece(pieces)
        x_remoe = (event.model_extra or {}).get("x_remoe") or x_remoe
    return Answer(text, first_s, time.monotonic() - began, finish, x_remoe)


def asked(
    cluster: Cluster,
    prompt: str,
    *,
    tokens: int = TOKENS,
    on_piece: Callable[[int], None] = lambda count: None,
) -> Answer:
    """The same of a deployment's gateway."""
    with cluster.client("gateway") as client:
        return answer(client, prompt, tokens=tokens, on_piece=on_piece)
