"""Chat messages as a template sees them; what a template would silently drop is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from gateway.chat_template import ChatTurn
from gateway.requests import Message, Tool, ToolCall
from gateway.tool_calls import CALL_BEGIN, CALL_END, system_text
from remoe.errors import InvalidRequestError, UnsupportedParameterError

__all__ = ["turns"]


def turns(
    messages: Sequence[Message], tools: Sequence[Tool] = (), *, native_tools: bool = False
) -> list[ChatTurn]:
    """Check and flatten messages; errors name the place, as in `messages[1].content[0].type`.

    With `native_tools` the template lays out tools, calls and results; else they become text.
    """
    flat = [
        _turn(f"messages[{index}]", message, native_tools=native_tools)
        for index, message in enumerate(messages)
    ]
    if not tools or native_tools:
        return flat
    told = system_text(tools)
    if flat[0]["role"] == "system":
        return [{**flat[0], "content": f"{flat[0]['content']}\n\n{told}"}, *flat[1:]]
    return [{"role": "system", "content": told}, *flat]


def _turn(where: str, message: Message, *, native_tools: bool) -> ChatTurn:
    _check(where, message)
    turn: dict[str, object] = {
        # "developer" is the newer name of the same role, which published templates do not know.
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(f"{where}.content", message),
    }
    if message.name is not None:
        turn["name"] = message.name
    calls = [
        _call(f"{where}.tool_calls[{number}]", call)
        for number, call in enumerate(message.tool_calls or [])
    ]
    if native_tools:
        if calls:
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return turn
    if calls:
        said = [turn["content"]] if turn["content"] else []
        made = [f"{CALL_BEGIN}{json.dumps(call, ensure_ascii=False)}{CALL_END}" for call in calls]
        turn["content"] = "\n".join(map(str, [*said, *made]))
    elif message.role == "tool":
        turn["role"] = "user"
        turn["content"] = f"<tool_response>\n{turn['content']}\n</tool_response>"
    return turn


def _check(where: str, message: Message) -> None:
    """Refuse what would be dropped, or what makes no sense."""
    extras = message.model_extra or {}
    if message.role == "function":
        raise UnsupportedParameterError(
            "Messages of the deprecated role 'function' are not supported; use the role 'tool'.",
            param=f"{where}.role",
        )
    for name in ("function_call", "audio"):
        if extras.get(name):
            raise UnsupportedParameterError(
                f"'{name}' in messages is not supported by this server; send text, or 'tool_calls'.",
                param=f"{where}.{name}",
            )
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(
            f"'{where}.tool_calls' may only be part of an assistant's message.",
            param=f"{where}.tool_calls",
        )
    if message.content is None and not message.tool_calls:
        raise InvalidRequestError(
            f"Missing required parameter: '{where}.content'.", param=f"{where}.content"
        )


def _call(where: str, call: ToolCall) -> dict[str, object]:
    """Templates lay arguments out themselves, so they want the object and not its JSON."""
    try:
        arguments = msgspec.json.decode(call.function.arguments, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise InvalidRequestError(
            f"'{where}.function.arguments' must be a JSON object in a string.",
            param=f"{where}.function.arguments",
        ) from None
    return {"name": call.function.name, "arguments": arguments}


def _text(where: str, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for number, part in enumerate(message.content or []):
        if part.type != "text":
            raise UnsupportedParameterError(
                f"Content of type '{part.type[:40]}' is not supported: this model reads text only.",
                param=f"{where}[{number}].type",
            )
        if part.text is None:
            raise InvalidRequestError(
                f"Missing required parameter: '{where}[{number}].text'.",
                param=f"{where}[{number}].text",
            )
        texts.append(part.text)
    return "\n".join(texts)
