"""Tool calls in a model's text, in Hermes' convention: `<tool_call>` JSON `</tool_call>`.

Qwen, Hermes and SmolLM2's larger models are trained on it and their templates speak it. A model
whose template knows nothing of tools is told of them, and of the convention, in a system message.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gateway.requests import Tool
from gateway.stop import StopMatcher

__all__ = ["CALL_BEGIN", "CALL_END", "ParsedCall", "ToolCallParser", "system_text"]

CALL_BEGIN = "<tool_call>\n"
CALL_END = "\n</tool_call>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call, complete; `arguments` is JSON."""

    index: int
    id: str
    name: str
    arguments: str


class _Call(msgspec.Struct):
    name: str
    arguments: dict[str, object]


class ToolCallParser:
    """Parts a text into what is said and what is called; the result ignores how it is cut.

    A call is given out when it is complete; white space between calls is dropped. What looks like
    a call and is none, as at the end of an answer cut short, is text.
    """

    def __init__(self) -> None:
        self._count = 0
        self._begin = StopMatcher((CALL_BEGIN.strip(),))
        self._inside: str | None = None
        self._after_call = False

    def push(self, piece: str) -> tuple[str, list[ParsedCall]]:
        """Add a piece; returns the text and the calls it completes."""
        text: list[str] = []
        calls: list[ParsedCall] = []
        while piece or self._inside:
            if self._inside is None:
                # The matcher forgets what follows a match, so a piece goes in by characters.
                rest = piece
                piece = ""
                for place, character in enumerate(rest, start=1):
                    step = self._begin.push(character)
                    text.append(self._said(step.text))
                    if step.stopped:
                        self._inside, piece = "", rest[place:]
                        break
                if self._inside is None:
                    break
            self._inside += piece
            piece = ""
            found = self._complete(self._inside)
            if found is None:
                break
            call, end = found
            calls.append(call)
            piece, self._inside = self._inside[end:], None
            self._after_call = True
        return "".join(text), calls

    def flush(self) -> str:
        """Return what is held at the end of the text."""
        if self._inside is not None:
            held, self._inside = self._inside, None
            return CALL_BEGIN.strip() + held
        return self._said(self._begin.flush())

    def _said(self, text: str) -> str:
        # The line break after a call is part of the convention and not of the answer.
        said = text.lstrip() if self._after_call else text
        self._after_call = self._after_call and not said
        return said

    def _complete(self, text: str) -> tuple[ParsedCall, int] | None:
        # Arguments may themselves contain the end mark, so the first one need not be the end.
        end = -1
        mark = CALL_END.strip()
        while (end := text.find(mark, end + 1)) >= 0:
            try:
                call = msgspec.json.decode(text[:end], type=_Call)
            except (msgspec.DecodeError, UnicodeEncodeError):
                continue
            parsed = ParsedCall(
                index=self._count,
                id=f"call_{uuid.uuid4().hex[:24]}",
                name=call.name,
                arguments=json.dumps(call.arguments, ensure_ascii=False),
            )
            self._count += 1
            return parsed, end + len(mark)
        return None


def system_text(tools: Sequence[Tool]) -> str:
    """What a model whose template has no place for tools is told of them."""
    listed = "\n".join(
        json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools
    )
    return (
        "You may call functions to help with the user's request. These are their signatures:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call a function, answer with its name and arguments as JSON within tool_call tags:\n"
        f'{CALL_BEGIN}{{"name": <function name>, "arguments": <arguments object>}}{CALL_END}'
    )
