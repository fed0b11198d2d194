"""One chunk of an OpenAI stream, of either endpoint and of any server, read leniently."""

from __future__ import annotations

import msgspec

from loadgen.receipt import Receipt

__all__ = ["Chunk", "Usage", "decode_chunk", "error_message"]


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    # What reasoning models write before they answer, by its two names.
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    x_remoe: Receipt | None = None
    error: msgspec.Raw = msgspec.Raw()

    @property
    def failed(self) -> bool:
        """Whether this is an error in place of a chunk."""
        return bytes(self.error) not in {b"", b"null"}

    @property
    def has_text(self) -> bool:
        for choice in self.choices:
            delta = choice.delta
            if choice.text or (
                delta and (delta.content or delta.reasoning_content or delta.reasoning)
            ):
                return True
        return False

    @property
    def finish_reason(self) -> str | None:
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


decode_chunk = msgspec.json.Decoder(Chunk).decode
"""Raises msgspec.DecodeError for what is no chunk."""


class _ErrorBody(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None


class _ErrorEnvelope(msgspec.Struct):
    error: _ErrorBody | str | None = None
    detail: msgspec.Raw = msgspec.Raw()
    message: str | None = None


def error_message(body: bytes) -> tuple[str | None, str]:
    """Return the code and the message of an error body in any of the usual shapes."""
    try:
        envelope = msgspec.json.decode(body, type=_ErrorEnvelope)
    except msgspec.DecodeError:
        return None, body[:500].decode(errors="replace").strip()
    if isinstance(envelope.error, _ErrorBody):
        code = envelope.error.code or envelope.error.type
        return None if code is None else str(code), envelope.error.message or ""
    if isinstance(envelope.error, str):
        return None, envelope.error
    if bytes(envelope.detail) not in {b"", b"null"}:
        return None, bytes(envelope.detail).decode(errors="replace")
    return None, envelope.message or body[:500].decode(errors="replace")
