"""The two shapes a reply can have: chat and text completion, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from gateway.admission import Job
from gateway.choice import Shown
from gateway.generation import ChoiceDelta
from gateway.logprobs import chat_logprobs, completion_logprobs
from gateway.receipt import Receipt
from gateway.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    FunctionCallReply,
    ToolCallReply,
    Usage,
)
from gateway.tool_calls import ParsedCall
from gateway.vocabulary import Vocabulary
from remoe.errors import ErrorEnvelope, RemoeError

__all__ = ["ChatFormat", "CompletionFormat", "ReplyFormat", "WholeChoice"]

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class WholeChoice:
    shown: Shown
    finish: FinishReason


class ReplyFormat(Protocol):
    """Builds the objects of one reply; all share its id and its time."""

    @property
    def id(self) -> str: ...

    def whole(
        self, choices: Sequence[WholeChoice], usage: Usage, receipt: Receipt
    ) -> msgspec.Struct: ...

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        """The chunks of one delta; the receipt goes on the last of them."""
        ...

    def usage_chunk(self, usage: Usage, receipt: Receipt) -> msgspec.Struct: ...

    def failure(self, error: RemoeError) -> msgspec.Struct | ErrorEnvelope:
        """What a stream that has begun says of an error, the last of it."""
        ...

    @staticmethod
    def frame(item: msgspec.Struct | ErrorEnvelope) -> bytes:
        """One object as a server-sent event."""
        ...

    @property
    def end(self) -> bytes:
        """What comes after the last object of a stream that did not fail."""
        ...


class _Format:
    _prefix: ClassVar[str]
    end = b"data: [DONE]\n\n"

    @staticmethod
    def frame(item: msgspec.Struct | ErrorEnvelope) -> bytes:
        return b"data: %b\n\n" % _encoder.encode(item)

    @staticmethod
    def failure(error: RemoeError) -> msgspec.Struct | ErrorEnvelope:
        return error.envelope()

    def __init__(self, job: Job, vocabulary: Vocabulary) -> None:
        self.id = f"{self._prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = job.model
        # With include_usage every chunk has the key; without it none has.
        self._no_usage: UnsetType | None = None if job.include_usage else UNSET
        self._vocabulary = vocabulary
        self._with_logprobs = job.logprobs is not None and job.shows_logprobs


class ChatFormat(_Format):
    _prefix = "chatcmpl"

    def __init__(self, job: Job, vocabulary: Vocabulary) -> None:
        super().__init__(job, vocabulary)
        self._begun: set[int] = set()

    def whole(
        self, choices: Sequence[WholeChoice], usage: Usage, receipt: Receipt
    ) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=index,
                    message=_message(choice.shown),
                    logprobs=chat_logprobs(choice.shown.pieces, self._vocabulary)
                    if self._with_logprobs
                    else None,
                    finish_reason=choice.finish,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            x_remoe=receipt,
        )

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        chunks: list[msgspec.Struct] = []
        shown = delta.shown
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._chunk(delta.index, ChatDelta(role="assistant", content="")))
        if shown.text or shown.pieces:
            logprobs = (
                chat_logprobs(shown.pieces, self._vocabulary) if self._with_logprobs else None
            )
            chunks.append(
                self._chunk(delta.index, ChatDelta(content=shown.text), logprobs=logprobs)
            )
        for call in shown.calls:
            reply = _call(call, index=call.index)
            chunks.append(self._chunk(delta.index, ChatDelta(tool_calls=[reply])))
        if delta.finish:
            chunks.append(self._chunk(delta.index, ChatDelta(), delta.finish, receipt))
        return chunks

    def usage_chunk(self, usage: Usage, receipt: Receipt) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage,
            x_remoe=receipt,
        )

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        finish: FinishReason | None = None,
        receipt: Receipt | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
            ],
            usage=self._no_usage,
            x_remoe=receipt or UNSET,
        )


class CompletionFormat(_Format):
    _prefix = "cmpl"

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, receipt: Receipt) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.shown.text,
                    logprobs=self._logprobs(choice.shown),
                    finish_reason=choice.finish,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            x_remoe=receipt,
        )

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        choice = CompletionChoice(
            index=delta.index,
            text=delta.shown.text,
            logprobs=self._logprobs(delta.shown),
            finish_reason=delta.finish,
        )
        return [
            Completion(
                id=self.id,
                created=self._created,
                model=self._model,
                choices=[choice],
                usage=self._no_usage,
                x_remoe=receipt or UNSET,
            )
        ]

    def _logprobs(self, shown: Shown) -> CompletionLogprobs | None:
        return completion_logprobs(shown.pieces, self._vocabulary) if self._with_logprobs else None

    def usage_chunk(self, usage: Usage, receipt: Receipt) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage,
            x_remoe=receipt,
        )


def _message(shown: Shown) -> ChatMessage:
    calls = [_call(call) for call in shown.calls]
    return ChatMessage(
        content=None if calls and not shown.text else shown.text, tool_calls=calls or UNSET
    )


def _call(call: ParsedCall, index: int | UnsetType = UNSET) -> ToolCallReply:
    function = FunctionCallReply(name=call.name, arguments=call.arguments)
    return ToolCallReply(index=index, id=call.id, function=function)
