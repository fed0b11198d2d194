"""A planner killed with SIGKILL at any moment has lost nothing that it had acknowledged.

The real program is started on one history file again and again, several clients report without
pause, and each time it is killed at a moment of chance. `--crash-kills 200` is the long run.
"""

from __future__ import annotations

import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from planner.history_store import Entry, HistoryStore, history_path
from tests.planner.test_process import START_LIMIT_S, environment, free_port
from tests.planner.worlds import EXPERTS, LAYERS, World

_CLIENTS = 3
_LONGEST_LIFE_S = 0.3


def tokens_of(number: int) -> list[int]:
    """A prompt that no other number below 14^4 has, whatever the order of its tokens."""
    digits = [number // 14**place % 14 for place in range(4)]
    return [place + 1 for place, digit in enumerate(digits) for _ in range(digit + 1)]


def counts_of(number: int) -> list[list[int]]:
    chance = random.Random(number)
    return [[chance.randrange(1, 50) for _ in range(EXPERTS)] for _ in range(LAYERS)]


class Reporter(threading.Thread):
    """Reports one observation after another until the planner is gone; keeps the acknowledged."""

    def __init__(self, world: World, url: str, numbers: range) -> None:
        super().__init__()
        self._world = world
        self._url = url
        self._numbers = iter(numbers)
        self.sent: list[int] = []
        self.acknowledged: list[int] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=START_LIMIT_S) as client:
            for number in self._numbers:
                counts = counts_of(number)
                body = msgspec.json.encode(
                    self._world.observation(
                        tokens_of(number), prefill_counts=counts, decode_counts=counts
                    )
                )
                self.sent.append(number)
                try:
                    response = client.post("/v1/observations", content=body)
                except httpx.TransportError:
                    return
                assert response.status_code == 202, response.text
                self.acknowledged.append(number)


def wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), START_LIMIT_S):
            return
        time.sleep(0.02)


def run_and_kill(
    world: World, path: Path, first: int, chance: random.Random, **more: str
) -> list[Reporter]:
    port = free_port()
    settings = {"PORT": str(port), "REMOE_PLANNER_HISTORY_DIR": str(path.parent), **more}
    process = subprocess.Popen(
        [sys.executable, "-m", "planner"],
        env=environment(world, **settings),
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    reporters = [
        Reporter(world, url, range(first + client, 10**6, _CLIENTS)) for client in range(_CLIENTS)
    ]
    try:
        wait_until_it_listens(port, process)
        for reporter in reporters:
            reporter.start()
        while not any(reporter.acknowledged for reporter in reporters):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(chance.uniform(0, _LONGEST_LIFE_S))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(START_LIMIT_S)
        for reporter in reporters:
            reporter.join(START_LIMIT_S)
    return reporters


def check_integrity(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_acknowledged_observation_is_lost_or_damaged(world: World, crash_kills: int) -> None:
    path = history_path(world.folder / "kept", world.identity)
    chance = random.Random(0)
    sent: set[int] = set()
    acknowledged: set[int] = set()
    lives = []
    for _ in range(crash_kills):
        before = len(acknowledged)
        first = max(sent, default=-1) + 1
        reporters = run_and_kill(
            world, path, first, chance, REMOE_PLANNER_HISTORY_CAPACITY="100000"
        )
        for reporter in reporters:
            sent.update(reporter.sent)
            acknowledged.update(reporter.acknowledged)
        lives.append(len(acknowledged) - before)
    check_integrity(path)
    store = HistoryStore.open(path, world.identity)
    entries = list(store.entries())
    store.close()
    assert {entry.demand for entry in entries} == {1}
    assert len(acknowledged) <= len(entries) <= len(sent)
    embedder = world.planner()._embedder
    of_length: dict[int, list[Entry]] = {}
    for entry in entries:
        of_length.setdefault(entry.n_tokens, []).append(entry)
    stacked = {length: np.stack([e.vector for e in found]) for length, found in of_length.items()}
    for number in acknowledged:
        tokens = tokens_of(number)
        similarity = stacked[len(tokens)] @ embedder.embed(tokens)
        entry = of_length[len(tokens)][int(similarity.argmax())]
        counts = np.array(counts_of(number), float)
        shares = counts / counts.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(entry.prefill, shares, atol=1e-3)
        np.testing.assert_allclose(entry.decode, shares, atol=1e-3)
    print(  # noqa: T201
        f"{crash_kills} kills, {len(acknowledged)} acknowledged, {len(sent)} sent, "
        f"{min(lives)} to {max(lives)} acknowledged in a life"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_folding_under_fire_loses_no_demand(world: World, crash_kills: int) -> None:
    path = history_path(world.folder / "kept", world.identity)
    chance = random.Random(1)
    sent = acknowledged = 0
    for _ in range(max(3, crash_kills // 4)):
        reporters = run_and_kill(world, path, sent, chance, REMOE_PLANNER_HISTORY_CAPACITY="40")
        sent += sum(len(reporter.sent) for reporter in reporters)
        acknowledged += sum(len(reporter.acknowledged) for reporter in reporters)
    check_integrity(path)
    store = HistoryStore.open(path, world.identity)
    entries = list(store.entries())
    store.close()
    assert len(entries) <= 40
    assert acknowledged <= sum(entry.demand for entry in entries) <= sent
