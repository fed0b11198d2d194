"""The objects of `/v1/responses`: one whole reply, and the events of a streamed one.

One message with one part of text is all there is in an answer of this server.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.admission import Job
from gateway.formats import WholeChoice
from gateway.generation import ChoiceDelta
from gateway.receipt import Receipt
from gateway.replies import FinishReason, Usage
from remoe.errors import ErrorEnvelope, RemoeError

__all__ = ["ResponseFormat"]

Status = Literal["in_progress", "completed", "incomplete"]
_encoder = msgspec.json.Encoder()


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[None] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class InputDetails(msgspec.Struct, frozen=True):
    """Nothing is stored between requests, so nothing of that is counted."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class PlainText(msgspec.Struct, frozen=True):
    type: Literal["text"] = "text"


class TextOptions(msgspec.Struct, frozen=True):
    format: PlainText = PlainText()


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for is repeated in it, as OpenAI does."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: TextOptions = TextOptions()
    tool_choice: Literal["none"] = "none"
    tools: list[None] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    x_remoe: Receipt | UnsetType = UNSET


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Every kind of event; each has the fields of its kind."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputMessage | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[None] | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET


class ResponseFormat:
    """Builds the reply to one job of kind "responses"; `gateway.formats.ReplyFormat`."""

    end = b""  # its last event says that it is the last

    def __init__(self, job: Job) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._job = job
        self._text = ""
        self._finish: FinishReason | None = None
        self._events = 0

    @staticmethod
    def frame(item: msgspec.Struct | ErrorEnvelope) -> bytes:
        kind = item.type if isinstance(item, ResponseEvent) else "message"
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encoder.encode(item))

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, receipt: Receipt) -> Response:
        (choice,) = choices
        self._text, self._finish = choice.shown.text, choice.finish
        return self._response(usage, receipt)

    def chunks(self, delta: ChoiceDelta, receipt: Receipt | None) -> list[msgspec.Struct]:
        """The events of one delta. The receipt comes with the usage, after all of them."""
        events: list[msgspec.Struct] = [] if self._events else self._beginning()
        if delta.shown.text:
            self._text += delta.shown.text
            events.append(self._part("output_text.delta", delta=delta.shown.text, logprobs=[]))
        if delta.finish:
            self._finish = delta.finish
            events += [
                self._part("output_text.done", text=self._text, logprobs=[]),
                self._part("content_part.done", part=OutputText(text=self._text)),
                self._event("output_item.done", output_index=0, item=self._message()),
            ]
        return events

    def usage_chunk(self, usage: Usage, receipt: Receipt) -> ResponseEvent:
        """The last event, with the whole reply."""
        return self._event(self._status, response=self._response(usage, receipt))

    def failure(self, error: RemoeError) -> ResponseEvent:
        told = error.envelope()["error"]
        return ResponseEvent(
            type="error",
            sequence_number=self._next(),
            code=told["code"],
            message=told["message"],
            param=told["param"],
        )

    @property
    def _status(self) -> Status:
        if self._finish is None:
            return "in_progress"
        return "incomplete" if self._finish == "length" else "completed"

    def _beginning(self) -> list[msgspec.Struct]:
        begun = self._response()
        empty = OutputMessage(id=self._message_id, status="in_progress", content=[])
        return [
            self._event("created", response=begun),
            self._event("in_progress", response=begun),
            self._event("output_item.added", output_index=0, item=empty),
            self._part("content_part.added", part=OutputText(text="")),
        ]

    def _message(self) -> OutputMessage:
        text = OutputText(text=self._text)
        return OutputMessage(id=self._message_id, status=self._status, content=[text])

    def _response(self, usage: Usage | None = None, receipt: Receipt | None = None) -> Response:
        asked, sampling = self._job.asked, self._job.sampling[0]
        return Response(
            id=self.id,
            created_at=self._created_at,
            status=self._status,
            incomplete_details=IncompleteDetails() if self._status == "incomplete" else None,
            instructions=asked.instructions if asked else None,
            max_output_tokens=asked.max_output_tokens if asked else None,
            model=self._job.model,
            output=[self._message()] if self._finish else [],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            usage=None
            if usage is None
            else ResponseUsage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
            x_remoe=receipt or UNSET,
        )

    def _part(self, kind: str, **fields: object) -> ResponseEvent:
        return self._event(
            kind, item_id=self._message_id, output_index=0, content_index=0, **fields
        )

    def _event(self, kind: str, **fields: object) -> ResponseEvent:
        return ResponseEvent(
            type=f"response.{kind}",
            sequence_number=self._next(),
            **fields,  # type: ignore[arg-type]  # msgspec checks no types here
        )

    def _next(self) -> int:
        self._events += 1
        return self._events - 1
