"""What `/v1/responses` is given, instructions and items, as the messages of a conversation."""

from __future__ import annotations

from gateway.requests import ContentPart, Message, ResponseRequest
from remoe.errors import InvalidRequestError, UnsupportedParameterError

__all__ = ["messages_of"]


def messages_of(request: ResponseRequest) -> list[Message]:
    """The instructions and the input as a conversation; what is not text is refused by name."""
    given = [] if request.instructions is None else [("system", request.instructions)]
    if isinstance(request.input, str):
        given.append(("user", request.input))
    else:
        for number, item in enumerate(request.input):
            where = f"input[{number}]"
            if item.type != "message":
                raise UnsupportedParameterError(
                    f"Items of type '{item.type[:40]}' are not supported: send messages of text.",
                    param=f"{where}.type",
                )
            for name in ("role", "content"):
                if getattr(item, name) is None:
                    raise InvalidRequestError(
                        f"Missing required parameter: '{where}.{name}'.", param=f"{where}.{name}"
                    )
            given.append((item.role or "user", _item_text(where, item.content or "")))
    return [Message.model_validate({"role": role, "content": text}) for role, text in given]


def _item_text(where: str, content: str | list[ContentPart]) -> str:
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type not in {"input_text", "output_text"} or part.text is None:
            raise UnsupportedParameterError(
                f"Content of type '{part.type[:40]}' is not supported: this model reads text "
                "only, as parts of type 'input_text' or 'output_text' with a 'text'.",
                param=f"{where}.content[{number}].type",
            )
    return "\n".join(part.text or "" for part in content)
