"""What is kept of one request, one JSON line each, written as soon as it is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from loadgen.receipt import Receipt
from remoe.errors import SettingsError

__all__ = ["RecordFile", "RequestRecord", "Status", "read_records"]

Status = Literal["completed", "failed", "incomplete", "cancelled", "skipped"]


class RequestRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. All `_s` times are seconds since the run's zero, on one monotonic clock.

    intended_s: when the schedule wanted it sent; None in a closed loop.
    sent_s: when it was handed to a connection; None if it never was.
    first_token_s: the first chunk with text; last_s: the last byte.
    itl_s: gaps between successive chunks with text.
    prompt_tokens, output_tokens: as the server's `usage` says, else None and chunks are counted.
    status: `incomplete` streams ended without their end; `cancelled` ones were cut off by the end
        of the run; `skipped` ones were not sent because too many were in flight.
    receipt: what Remoe says of the request (`x_remoe`).
    """

    index: int
    stage: int = 0
    warm_up: bool = False
    topic: str | None = None
    asked_prompt_tokens: int | None = None
    asked_output_tokens: int | None = None
    intended_s: float | None = None
    sent_s: float | None = None
    first_token_s: float | None = None
    last_s: float | None = None
    itl_s: list[float] = []
    chunks: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    status: Status = "cancelled"
    http_status: int | None = None
    error: str | None = None
    error_detail: str | None = None
    receipt: Receipt | None = None

    @property
    def tokens(self) -> int:
        """Output tokens: by the server's count, else one for each chunk."""
        return self.chunks if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        return _difference(self.first_token_s, self.sent_s)

    @property
    def e2e_s(self) -> float | None:
        """First byte sent to last byte read; None unless completed."""
        return _difference(self.last_s, self.sent_s) if self.status == "completed" else None

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); None below two tokens."""
        if self.e2e_s is None or self.ttft_s is None or self.tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1)

    @property
    def lag_s(self) -> float | None:
        """Schedule lag: how much later than intended it was sent."""
        return _difference(self.sent_s, self.intended_s)


def _difference(end: float | None, begin: float | None) -> float | None:
    return None if end is None or begin is None else end - begin


class RecordFile:
    """`requests.jsonl`: a line at a time, on disk at once, so that a killed run keeps them."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, record: RequestRecord) -> None:
        self._file.write(self._encoder.encode(record) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[RequestRecord]:
    """Yield the records of a file; a last line that was cut off by a kill is left out.

    Raises SettingsError with the line number for any other line that cannot be read.
    """
    decoder = msgspec.json.Decoder(RequestRecord)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise SettingsError(f"{path}:{number}: not a request record: {error}") from error
