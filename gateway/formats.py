"""The two shapes a reply can have: chat and text completion, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from gateway.admission import Job
from gateway.generation import ChoiceDelta
from gateway.receipt import Receipt
from gateway.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    FinishReason,
    Usage,
)

__all__ = ["ReplyFormat", "WholeChoice", "format_for"]


@dataclass(frozen=True, slots=True)
class WholeChoice:
    text: str
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


def format_for(job: Job) -> ReplyFormat:
    return _ChatFormat(job) if job.kind == "chat" else _CompletionFormat(job)


class _Format:
    def __init__(self, job: Job, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = job.model
        # With include_usage every chunk has the key; without it none has.
        self._no_usage: UnsetType | None = None if job.include_usage else UNSET


class _ChatFormat(_Format):
    def __init__(self, job: Job) -> None:
        super().__init__(job, "chatcmpl")
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
                    message=ChatMessage(content=choice.text),
                    finish_reason=choice.finish,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            x_remoe=receipt,
        )

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        chunks: list[msgspec.Struct] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(self._chunk(delta.index, ChatDelta(role="assistant", content="")))
        if delta.text:
            chunks.append(self._chunk(delta.index, ChatDelta(content=delta.text)))
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
    ) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[ChatChunkChoice(index=index, delta=delta, finish_reason=finish)],
            usage=self._no_usage,
            x_remoe=receipt or UNSET,
        )


class _CompletionFormat(_Format):
    def __init__(self, job: Job) -> None:
        super().__init__(job, "cmpl")

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, receipt: Receipt) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[
                CompletionChoice(index=index, text=choice.text, finish_reason=choice.finish)
                for index, choice in enumerate(choices)
            ],
            usage=usage,
            x_remoe=receipt,
        )

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        choice = CompletionChoice(index=delta.index, text=delta.text, finish_reason=delta.finish)
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

    def usage_chunk(self, usage: Usage, receipt: Receipt) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage,
            x_remoe=receipt,
        )
