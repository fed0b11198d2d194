"""Our own traces: one JSON object a line, which may carry its prompt.

`{"arrival_s": 1.25, "prompt_tokens": 120, "output_tokens": 40}`, with `prompt` (the text itself) and
`topic` if wanted; with a prompt, `prompt_tokens` may be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from loadgen.readers.text_files import open_text
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["read_own_trace", "write_own_trace"]


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    arrival_s: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    prompt: str | None = None
    topic: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < float("inf"):
            raise ValueError("arrival_s must be 0 or more seconds")
        if min(self.prompt_tokens or 0, self.output_tokens or 0) < 0:
            raise ValueError("a negative number of tokens")


def read_own_trace(path: Path, options: ReadOptions | None = None) -> Iterator[TracedRequest]:
    """Yield the requests in the file's order; raises TraceError at the first bad line."""
    decoder = msgspec.json.Decoder(_Line)
    with open_text(path) as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise TraceError(f"{path}:{number}: {error}") from error
            yield TracedRequest(*msgspec.structs.astuple(line))


def write_own_trace(path: Path, requests: Iterable[TracedRequest]) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for request in requests:
            line = _Line(
                round(request.arrival_s, 6),
                request.prompt_tokens,
                request.output_tokens,
                request.prompt,
                request.topic,
            )
            file.write(encoder.encode(line) + b"\n")
