"""Readers of public traces, one a format, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from loadgen.readers.azure_functions import (
    read_azure_function_counts,
    read_azure_function_invocations,
)
from loadgen.readers.azure_llm import read_azure_trace
from loadgen.readers.mooncake import read_mooncake_csv, read_mooncake_jsonl
from loadgen.readers.own import read_own_trace
from loadgen.readers.servegen import read_servegen_rates
from loadgen.readers.text_files import first_line
from loadgen.trace import ReadOptions, TracedRequest, TraceError

__all__ = ["FORMATS", "detect_format", "read_trace"]

Reader = Callable[[Path, ReadOptions], Iterator[TracedRequest]]

FORMATS: dict[str, Reader] = {
    "azure-llm": read_azure_trace,
    "azure-functions-counts": read_azure_function_counts,
    "azure-functions-invocations": read_azure_function_invocations,
    "mooncake-jsonl": read_mooncake_jsonl,
    "mooncake-csv": read_mooncake_csv,
    "servegen-rates": read_servegen_rates,
    "remoe-jsonl": read_own_trace,
}

# How the first line of each format begins; JSON lines are told apart by a key.
_HEADERS = {
    "TIMESTAMP,ContextTokens": "azure-llm",
    "HashOwner,HashApp,HashFunction,Trigger": "azure-functions-counts",
    "app,func,end_timestamp": "azure-functions-invocations",
    "timestamp_ms,input_length": "mooncake-csv",
    "window_start_s,client,rate_rps": "servegen-rates",
}
_KEYS = {'"arrival_s"': "remoe-jsonl", '"timestamp"': "mooncake-jsonl"}


def detect_format(path: Path) -> str:
    """Name the format by the file's first line; raises TraceError if it is none of them."""
    line = first_line(path).lower()
    for start, name in _HEADERS.items():
        if line.startswith(start.lower()):
            return name
    for key, name in _KEYS.items():
        if line.startswith("{") and key in line:
            return name
    shown = line[:60] + ("..." if len(line) > 60 else "")
    raise TraceError(
        f"{path}:1: no known trace begins with {shown!r}. Known are {', '.join(FORMATS)}; see "
        "docs/load.md for their first lines."
    )


def read_trace(
    path: Path, options: ReadOptions | None = None, *, name: str | None = None
) -> Iterator[TracedRequest]:
    """Yield a file's requests, sorted by arrival from zero; raises TraceError at a bad line."""
    reader = FORMATS[name or detect_format(path)]
    last_s = 0.0
    for count, request in enumerate(reader(path, options or ReadOptions()), start=1):
        if request.arrival_s < last_s:
            raise TraceError(
                f"{path}: request {count} comes {request.arrival_s:.6f} s after the first, and the "
                f"one before it {last_s:.6f} s; sort the trace by time"
            )
        last_s = request.arrival_s
        yield request
