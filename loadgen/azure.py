"""Read Azure's LLM inference traces as they are published.

The CSVs have CRLF line ends, seven fractional digits in their times, and no newline after the last
row. Source: Azure/AzurePublicDataset, `AzureLLMInferenceTrace_{code,conv}.csv` (Splitwise,
ISCA'24).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

__all__ = ["TraceError", "TracedRequest", "read_azure_trace"]

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class TraceError(ValueError):
    """A line that cannot be read; the message has the file, the line number, and what is wrong."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """`arrival_s` counts from the first request of the trace, which is not at its file's zero."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_azure_trace(path: Path) -> Iterator[TracedRequest]:
    """Yield the requests in the file's order; raises TraceError at the first bad line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != _COLUMNS:
            raise TraceError(f"{path}:1: the header is {header}, not {','.join(_COLUMNS)}")
        start: datetime | None = None
        for row in rows:
            try:
                stamp, prompt, output = row
                arrival = _parse_time(stamp)
                prompt_tokens, output_tokens = int(prompt), int(output)
            except ValueError as error:
                raise TraceError(f"{path}:{rows.line_num}: {row}: {error}") from error
            start = start or arrival
            yield TracedRequest((arrival - start).total_seconds(), prompt_tokens, output_tokens)


def _parse_time(text: str) -> datetime:
    """`2023-11-16 18:15:46.6805900`: tenths of microseconds are dropped, which strptime cannot."""
    seconds, _, fraction = text.partition(".")
    return datetime.fromisoformat(f"{seconds}.{fraction[:6].ljust(6, '0')}")
