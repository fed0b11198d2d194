"""The run directory: who runs, where its control socket is, and the logs; gone after a clean stop.

`$REMOE_HOME/run`, with REMOE_HOME `~/.cache/remoe` unless set. A lock that the kernel frees with
its holder tells a running supervisor from one that was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from remoe.errors import SettingsError

__all__ = ["RunDir"]

# sun_path's 108 bytes, less the final zero.
_LONGEST_SOCKET_PATH = 107


class RunDir:
    """Paths inside; `acquire` makes it ours, `release` removes it."""

    def __init__(self, home: Path) -> None:
        self.path = home / "run"
        self.control = self.path / "control.sock"
        self.topology = self.path / "topology.json"
        self.logs = self.path / "logs"
        self._lock_path = self.path / "lock"
        self._lock_fd: int | None = None

    def socket(self, number: int) -> Path:
        """A function's: by number, because a socket's path must be short and a name may be long."""
        return self.path / f"fn-{number}.sock"

    def log(self, function: str) -> Path:
        return self.logs / f"{function}.log"

    def acquire(self) -> bool:
        """Take the lock and clean up after a killed run; True if there was one.

        Raises SettingsError if a supervisor runs, or if the path cannot hold a socket.
        """
        if len(os.fsencode(self.control)) > _LONGEST_SOCKET_PATH:
            raise SettingsError(
                f"{self.control} is too long for a socket ({_LONGEST_SOCKET_PATH} bytes at most); "
                "set REMOE_HOME to a shorter path"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = self._lock()
        except OSError as error:
            raise SettingsError(
                f"cannot use {self.path}: {error.strerror}. Set REMOE_HOME to a writable folder."
            ) from error
        leftovers = [path for path in self.path.iterdir() if path != self._lock_path]
        for path in leftovers:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.logs.mkdir()
        os.ftruncate(self._lock_fd, 0)
        os.write(self._lock_fd, f"{os.getpid()}\n".encode())
        return bool(leftovers)

    def _lock(self) -> int:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(fd, 32).decode().strip() or "?"
                os.close(fd)
                raise SettingsError(
                    f"Remoe is running already (process {pid}). See it with `remoe status`, "
                    "stop it with `remoe down`; another one needs its own REMOE_HOME and --port."
                ) from None
            # A supervisor that just stopped may have removed the file we opened.
            try:
                if os.path.samestat(os.fstat(fd), self._lock_path.stat()):
                    return fd
            except FileNotFoundError:
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(fd)

    def running_pid(self) -> int | None:
        """The process that holds the lock, if one does."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(fd, 32).decode().strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(fd)
        return None

    def release(self, *, keep_logs: Path | None = None) -> None:
        """Remove the directory; logs are moved to `keep_logs` first, if given."""
        if self._lock_fd is None:
            return
        try:
            if keep_logs is not None:
                shutil.copytree(self.logs, keep_logs, dirs_exist_ok=True)
        finally:
            shutil.rmtree(self.path)
            os.close(self._lock_fd)
            self._lock_fd = None
