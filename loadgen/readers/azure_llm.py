"""Azure's LLM inference traces as they are published.

The CSVs have CRLF line ends, seven fractional digits in their times, and no newline after the last
row. Source: Azure/AzurePublicDataset, `AzureLLMInferenceTrace_{code,conv}.csv` (Splitwise,
ISCA'24).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from loadgen.readers.text_files import rows_of, tokens_of
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["read_azure_trace"]

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def read_azure_trace(path: Path, options: ReadOptions | None = None) -> Iterator[TracedRequest]:
    """Yield the requests in the file's order; raises TraceError at the first bad line."""
    start: datetime | None = None
    for line, row in rows_of(path, _COLUMNS):
        try:
            stamp, prompt, output = row
            arrival = _parse_time(stamp)
            prompt_tokens, output_tokens = tokens_of(prompt), tokens_of(output)
        except ValueError as error:
            raise TraceError(f"{path}:{line}: {row}: {error}") from error
        start = start or arrival
        yield TracedRequest((arrival - start).total_seconds(), prompt_tokens, output_tokens)


def _parse_time(text: str) -> datetime:
    """`2023-11-16 18:15:46.6805900`: tenths of microseconds are dropped, which strptime cannot."""
    seconds, _, fraction = text.partition(".")
    return datetime.fromisoformat(f"{seconds}.{fraction[:6].ljust(6, '0')}")
