"""A thread that runs streams: how they come to it, and what becomes of them when it ends."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

import structlog

from main_model_fn.stream import Stream

__all__ = ["RunnerThread"]

_log = structlog.get_logger()


class RunnerThread(ABC):
    """The part of a `Runner` (runner.py) that is the same however streams are run."""

    def __init__(self) -> None:
        self._come: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine")

    @abstractmethod
    def _serve(self) -> None:
        """Run the streams that come, until None does."""

    @abstractmethod
    def _taken(self) -> Iterable[Stream]:
        """Those that came and are not done."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._come.put(None)
        self._thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, stream: Stream) -> None:
        self._come.put(stream)
        if not self.alive:
            stream.fail()

    def cancel(self, stream: Stream) -> None:  # noqa: B027  # not abstract: nothing is enough
        """Nothing to do: that it has ended is seen after the step under way, or at its turn."""

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:  # noqa: BLE001  # whatever it was, the replica is replaced
            self._fail_all()  # now: telling a trace can take a second
            _log.exception("engine_failed")
        finally:
            self._fail_all()

    def _fail_all(self) -> None:
        for stream in self._taken():
            stream.fail()
        while not self._come.empty():
            if (waiting := self._come.get()) is not None:
                waiting.fail()
