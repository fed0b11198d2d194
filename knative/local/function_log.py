"""One log file per function: every line of its replicas, with the replica's name in front."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

__all__ = ["FunctionLog", "LogPipe"]

_MOST_BYTES = 10 << 20
_MOST_LINE = 64 << 10


class FunctionLog:
    """An append-only file; at 10 MiB it moves to `.1`, over the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, prefix: str, line: bytes) -> None:
        self._file.write(prefix.encode() + b" | " + line + b"\n")
        if self._file.tell() > _MOST_BYTES:
            self._file.close()
            self.path.replace(self.path.with_suffix(".log.1"))
            self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


class LogPipe:
    """Carries one replica's output into its function's log; `write_fd` is for the child."""

    def __init__(self, log: FunctionLog, prefix: str) -> None:
        self._log = log
        self._prefix = prefix
        self._rest = b""
        self.last_line = ""
        self._loop = asyncio.get_running_loop()
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._read)
        self._open = True

    def close_write(self) -> None:
        """Close this side's copy of the child's end, once the child has its own."""
        os.close(self.write_fd)

    def finish(self) -> None:
        """Take what is left after the child's end."""
        while self._open and self._read():
            pass
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        self._close()

    def _read(self) -> bool:
        try:
            data = os.read(self._read_fd, _MOST_LINE)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > _MOST_LINE:
            self._line(self._rest)
            self._rest = b""
        return True

    def _line(self, line: bytes) -> None:
        if line.strip():
            self.last_line = line.decode(errors="replace").strip()
        self._log.write(self._prefix, line)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._read_fd)
            os.close(self._read_fd)
