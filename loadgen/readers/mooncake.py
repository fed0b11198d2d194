"""Mooncake's traces, the lingua franca of LLM load generators (Qin et al., FAST'25).

One object a line, `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`, or
the same three numbers as CSV. The block hashes are not used: prompts here share no prefix but
their topic's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from loadgen.readers.text_files import open_text, rows_of, tokens_of
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["read_mooncake_csv", "read_mooncake_jsonl"]


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int

    def __post_init__(self) -> None:
        if self.input_length < 0 or self.output_length < 0:
            raise ValueError("a negative length")


def read_mooncake_jsonl(path: Path, options: ReadOptions | None = None) -> Iterator[TracedRequest]:
    """Yield the requests in the file's order; raises TraceError at the first bad line."""
    decoder = msgspec.json.Decoder(_Line)
    start_ms: float | None = None
    with open_text(path) as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise TraceError(f"{path}:{number}: {error}") from error
            start_ms = line.timestamp if start_ms is None else start_ms
            yield TracedRequest(
                (line.timestamp - start_ms) / 1e3, line.input_length, line.output_length
            )


def read_mooncake_csv(path: Path, options: ReadOptions | None = None) -> Iterator[TracedRequest]:
    """Yield the requests in the file's order; raises TraceError at the first bad line."""
    start_ms: float | None = None
    for line, row in rows_of(path, ["timestamp_ms", "input_length", "output_length"]):
        try:
            at_ms, prompt, output = float(row[0]), tokens_of(row[1]), tokens_of(row[2])
        except ValueError as error:
            raise TraceError(f"{path}:{line}: {row}: {error}") from error
        start_ms = at_ms if start_ms is None else start_ms
        yield TracedRequest((at_ms - start_ms) / 1e3, prompt, output)
