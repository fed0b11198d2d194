"""A child process: spawned with inherited sockets in a group of its own, watched by pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Process", "describe_exit"]

# Descriptors to hand down are first copied above all targets, so that none overwrites another.
_ABOVE_TARGETS = 10


class Process:
    """Runs until it exits by itself or is killed; `on_exit` gets its exit code, once."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        fds: Mapping[int, int],
        on_exit: Callable[[int], None],
    ) -> None:
        """`fds` maps the child's descriptor numbers to ours; all others are closed there.

        The child is not in the terminal's group, so that Ctrl-C reaches only its parent.
        """
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as copies:
            actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
            ]
            for target, source in fds.items():
                copy = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS)
                copies.callback(os.close, copy)
                actions.append((os.POSIX_SPAWN_DUP2, copy, target))
            self.pid = os.posix_spawn(
                argv[0],
                list(argv),
                dict(env),
                file_actions=actions,
                setpgroup=0,
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
                setsigmask=[],
            )
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        self.running = True

    def terminate(self) -> None:
        """Ask it to drain and exit."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _exited(self) -> None:
        # Its group's number stays taken until the wait below, so this reaches no stranger.
        self.kill()
        _, status = os.waitpid(self.pid, 0)
        self.running = False
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._on_exit(os.waitstatus_to_exitcode(status))


def describe_exit(code: int) -> str:
    """`exited with status 1`, or `was killed by SIGKILL`."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"
