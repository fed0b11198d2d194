"""Threads of idle priority that poll for who waits for another process."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoe.kernel.idle_polling import IdlePolling

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")


@pytest.fixture
def polling(library: Path) -> Iterator[IdlePolling]:
    held = IdlePolling(library)
    yield held
    held.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def idle_threads() -> list[int]:
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return [thread for thread in threads if os.sched_getscheduler(thread) == os.SCHED_IDLE]


def test_a_wait_ends_when_something_comes(polling: IdlePolling, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    for _ in range(200):
        sender = threading.Thread(target=os.write, args=(writer, b"x"))
        sender.start()
        while not select.select([reader], [], [], 0)[0]:
            polling.stay_awake(time.monotonic())
            polling.wait(reader, 30)
        assert os.read(reader, 1) == b"x"
        sender.join()


def test_what_is_there_already_is_found(polling: IdlePolling, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"x")
    polling.stay_awake(time.monotonic())
    while not polling.wait(reader, 30):  # the threads may have had no processor for so long
        polling.stay_awake(time.monotonic())


def test_nobody_waits_longer_than_the_threads_stay_awake(
    polling: IdlePolling, pipe: tuple[int, int]
) -> None:
    assert not polling.wait(pipe[0], 3600)
    polling.stay_awake(time.monotonic())
    assert not polling.wait(pipe[0], 3600)
    polling.stay_awake(time.monotonic())
    assert not polling.wait(pipe[0], 0.0001)


def test_its_threads_are_made_when_needed_and_yield_to_all_others(library: Path) -> None:
    before = idle_threads()
    polling = IdlePolling(library)
    assert idle_threads() == before
    polling.stay_awake(time.monotonic())
    ours = set(idle_threads()) - set(before)
    assert len(ours) == min(8, len(os.sched_getaffinity(0)))
    assert len({frozenset(os.sched_getaffinity(thread)) for thread in ours}) == len(ours)
    polling.close()
    assert idle_threads() == before
    polling.stay_awake(time.monotonic())
    assert not polling.wait(0, 3600)


def test_without_a_library_every_wait_is_over_at_once(
    tmp_path: Path, pipe: tuple[int, int]
) -> None:
    polling = IdlePolling(tmp_path / "nothing.so")
    os.write(pipe[1], b"x")
    polling.stay_awake(time.monotonic())
    assert not polling.wait(pipe[0], 3600)
    polling.close()
