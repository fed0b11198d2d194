"""Chat messages as a template sees them; what a template would silently drop is refused."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.chat_template import ChatTurn
from gateway.requests import Message
from remoe.errors import InvalidRequestError, UnsupportedParameterError

__all__ = ["turns"]


def turns(messages: Sequence[Message]) -> list[ChatTurn]:
    """Check and flatten messages; errors name the place, as in `messages[1].content[0].type`."""
    return [_turn(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _turn(where: str, message: Message) -> ChatTurn:
    extras = message.model_extra or {}
    if message.role in {"tool", "function"}:
        raise UnsupportedParameterError(
            f"Messages of role '{message.role}' are not supported by this server yet; put the "
            "result into a user message.",
            param=f"{where}.role",
        )
    for name in ("tool_calls", "function_call", "audio"):
        if extras.get(name):
            raise UnsupportedParameterError(
                f"'{name}' in messages is not supported by this server yet; send text.",
                param=f"{where}.{name}",
            )
    if message.content is None:
        raise InvalidRequestError(
            f"Missing required parameter: '{where}.content'.", param=f"{where}.content"
        )
    turn = {
        # "developer" is the newer name of the same role, which published templates do not know.
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(f"{where}.content", message),
    }
    if message.name is not None:
        turn["name"] = message.name
    return turn


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
