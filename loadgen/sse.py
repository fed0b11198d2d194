"""Server-sent events, split from bytes as they come: any chunk borders, LF, CR or CRLF.

Only what OpenAI's streams use: the `data` of each event. Comments, such as heartbeats, and other
fields are skipped (WHATWG HTML, 9.2.6).
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["EventSplitter"]


class EventSplitter:
    """Feed it bytes; it yields the data of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        text = self._rest + chunk if self._rest else chunk
        # A CR at the end may be half of a CRLF.
        held = b"\r" if text.endswith(b"\r") else b""
        if b"\r" in text:
            text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = rest + held
        for line in lines:
            if line.startswith(b"data:"):
                value = line[5:]
                self._data.append(value[1:] if value.startswith(b" ") else value)
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []
