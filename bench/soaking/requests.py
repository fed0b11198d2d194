"""Requests of every kind that a soak asks, and what a client has of their answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

__all__ = ["Kind", "Reply", "ask", "kinds"]

PROMPTS = ["The capital of France", "Cold experts sleep", "a model answers", "Hello world, hello"]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["hot", "cold"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "wake", "parameters": SCHEMA}}


@dataclass(frozen=True)
class Kind:
    """One request body; its answer is always the same."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass
class Reply:
    """What a client has of an answer."""

    id: str = ""
    texts: dict[str, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, str] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    error: str | None = None
    left: bool = False
    done: bool = False

    @property
    def answer(self) -> tuple[dict[str, str], dict[int, str]]:
        return dict(self.texts), self.finishes


def kinds(model: str) -> list[Kind]:
    made = []
    for number, prompt in enumerate(PROMPTS):
        for stream in (True, False):
            # No answer ends by chance; each is as long as it may be.
            common = {"model": model, "temperature": 0, "logit_bias": {"2": -100}, "stream": stream}
            chat = {**common, "messages": [{"role": "user", "content": prompt}], "seed": number}
            shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
            free = {key: value for key, value in chat.items() if key != "logit_bias"}
            bodies = {
                "completion": {**common, "prompt": prompt, "max_tokens": 8 + 4 * number},
                "prompts": {**common, "prompt": PROMPTS[: number + 1], "max_tokens": 6},
                "chat": {**chat, "max_tokens": 16},
                "sampled": {**chat, "temperature": 1.0, "n": 2, "max_tokens": 10},
                "stop": {**chat, "stop": ["e", "s"], "max_tokens": 24},
                "logprobs": {**chat, "logprobs": True, "top_logprobs": 3, "max_tokens": 8},
                "schema": {**free, "response_format": shape, "max_tokens": 60},
                "tool": {**free, "tools": [TOOL], "tool_choice": "required", "max_tokens": 80},
                "long": {**chat, "messages": [{"role": "user", "content": prompt * 20}]}
                | {"max_tokens": 4},
            }
            for name, body in bodies.items():
                path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
                made.append(Kind(f"{name}-{number}{'-stream' * stream}", path, body))
    return made


async def ask(http: aiohttp.ClientSession, kind: Kind, leave_after: int | None = None) -> Reply:
    """Ask once; `leave_after` chunks the client is gone."""
    reply = Reply()
    try:
        async with http.post(kind.path, json=kind.body) as response:
            if not kind.body["stream"] or response.status != 200:
                told = msgspec.json.decode(await response.read())
                _take(reply, told, "message")
                reply.done = reply.error is None
                return reply
            count = 0
            async for data in _events(response):
                if data == b"[DONE]":
                    reply.done = reply.error is None
                    continue
                _take(reply, msgspec.json.decode(data), "delta")
                count += 1
                if count == leave_after:
                    reply.left = True
                    return reply
            if not reply.done and reply.error is None:
                reply.error = "cut off"
    except (aiohttp.ClientError, TimeoutError) as error:
        reply.error = type(error).__name__
    return reply


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].strip()


def _take(reply: Reply, told: dict[str, Any], part: str) -> None:
    if "error" in told:
        reply.error = str(told["error"]["code"])
        return
    reply.id = told["id"]
    reply.receipt = told.get("x_remoe") or reply.receipt
    for choice in told["choices"]:
        said = choice.get(part) or {}
        index = choice["index"]
        reply.texts[f"{index}"] += choice.get("text") or said.get("content") or ""
        # Texts of their own: how these fall into chunks beside it depends on when tokens come.
        for call in said.get("tool_calls") or []:
            function = call["function"]
            called = (function.get("name") or "") + (function.get("arguments") or "")
            reply.texts[f"{index} calls"] += called
        scored = (choice.get("logprobs") or {}).get("content") or []
        reply.texts[f"{index} logprobs"] += "".join(f"|{entry['token']}" for entry in scored)
        if choice.get("finish_reason"):
            reply.finishes[choice["index"]] = choice["finish_reason"]
