"""Text files as traces come: maybe gzipped, with a BOM, CRLF, or no newline at the end."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from loadgen.trace import TraceError

__all__ = ["first_line", "open_text", "rows_of", "tokens_of"]


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open for reading, decompressed; raises TraceError for what is not UTF-8 or not gzip."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = gzip.GzipFile(fileobj=raw) if packed else raw
            yield io.TextIOWrapper(data, encoding="utf-8-sig", newline="")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise TraceError(f"{path}: not a readable text file: {error}") from error


def first_line(path: Path) -> str:
    """The first line, at most 4,096 characters of it; raises TraceError for an empty file."""
    with open_text(path) as file:
        line = file.readline(4096)
    if not line.strip():
        raise TraceError(f"{path}:1: the file is empty or begins with an empty line")
    return line.strip()


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of a CSV whose header begins with `columns`.

    Raises TraceError for another header, and for a row with more or fewer cells than the header.
    """
    with open_text(path) as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header[: len(columns)] != list(columns):
            raise TraceError(f"{path}:1: the header is {header}, not {','.join(columns)}")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise TraceError(
                    f"{path}:{rows.line_num}: {len(row)} cells where the header has {len(header)}: "
                    f"{','.join(row)[:80]}"
                )
            yield rows.line_num, row


def tokens_of(text: str, least: int = 0) -> int:
    """A token count; raises ValueError for what is none."""
    value = int(text)
    if value < least:
        raise ValueError(f"{value} tokens")
    return value
