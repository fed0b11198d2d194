"""Faults in real processes, under load: what clients see, what comes back by itself, and how soon.

`REMOE_SLOW_CONNECTIONS=10000 pytest tests/e2e/test_faults.py -s` prints the figures of docs/reliability.md. Wrong answers are
counted apart from failed ones: there are none, whatever breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import openai
import pytest
from tokenizers import Tokenizer

from tests.e2e.platform import Platform
from tests.gateway.tiny_text import write_model
from tests.tiny_model import build_tiny_checkpoint

pytestmark = pytest.mark.slow
CLIENTS = 4
PROMPTS = ["The capital of France", "Cold experts sleep", "a model answers", "user"]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = write_model(tmp_path_factory.mktemp("tiny-moe"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    build_tiny_checkpoint(folder, vocabulary=tokenizer.get_vocab_size())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    home = tmp_path_factory.mktemp("home")
    with Platform(folder, home, "--layers-per-function", "1") as platform:
        yield platform


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


@dataclass
class Load:
    """Clients that ask again and again, and compare each answer with the one they know."""

    platform: Platform
    expected: dict[str, str] = field(default_factory=dict)
    outcomes: list[tuple[float, float, str]] = field(default_factory=list)
    degraded: int = 0

    def ask(self, prompt: str) -> str:
        chunks = self.platform.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=60,
            temperature=0,
            logit_bias={"2": -100},
            stream=True,
            timeout=60,
        )
        text = ""
        for chunk in chunks:
            text += chunk.choices[0].text
            receipt = (chunk.model_extra or {}).get("x_remoe")
            self.degraded += receipt is not None and receipt["plan"] == "degraded"
        return text

    def __post_init__(self) -> None:
        self.model = self.platform.client.models.list().data[0].id
        for prompt in PROMPTS:
            self.expected[prompt] = self.ask(prompt)
            assert self.expected[prompt]
        self.degraded = 0

    def _loop(self, prompt: str, stop: threading.Event) -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                outcome = "right" if self.ask(prompt) == self.expected[prompt] else "WRONG"
            except openai.APIStatusError as error:
                outcome = f"{error.status_code} {error.code}"
            except openai.APIConnectionError:
                outcome = "connection"
            except openai.APIError as error:
                outcome = f"event {error.code}"
            self.outcomes.append((began, time.monotonic(), outcome))
            if outcome != "right":
                stop.wait(0.1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._loop, args=(PROMPTS[number % len(PROMPTS)], stop))
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(90)

    def wait(self, since: float, *, answers: int) -> float:
        """Until some answers that began later are right; the seconds from then to the first."""
        right: list[float] = []

        def enough() -> bool:
            right[:] = [
                end for began, end, outcome in self.outcomes if began > since and outcome == "right"
            ]
            return len(right) >= answers

        self.platform.wait_for(enough, within_s=60)
        return min(right) - since

    def report(self, name: str, since: float, recovered_s: float) -> Counter[str]:
        seen = Counter(outcome for _, end, outcome in self.outcomes if end > since)
        longest = max(end - began for began, end, _ in self.outcomes if end > since)
        say(
            f"\n{name}: {dict(seen)}; first right answer asked after it: {recovered_s:.2f} s; "
            f"longest {longest:.2f} s; degraded {self.degraded}"
        )
        assert seen["WRONG"] == 0
        return seen


def stricken(
    platform: Platform, name: str, strike: Callable[[], None], answers: int = 12
) -> Counter[str]:
    load = Load(platform)
    with load.running():
        load.wait(time.monotonic(), answers=CLIENTS)
        since = time.monotonic()
        strike()
        recovered_s = load.wait(since, answers=answers)
    return load.report(name, since, recovered_s)


def kill(platform: Platform, module: str) -> None:
    pids = platform.pids_of(module)
    assert pids, f"no {module} runs"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_killed_expert_functions_fail_no_request(platform: Platform) -> None:
    seen = stricken(platform, "expert functions killed", lambda: kill(platform, "expert_fn"))
    assert set(seen) == {"right"}


def test_a_killed_main_function_fails_what_it_had_begun_and_nothing_else(
    platform: Platform,
) -> None:
    seen = stricken(platform, "main function killed", lambda: kill(platform, "main_model_fn"))
    # Those of which no client had seen anything were held and answered by its successor.
    assert set(seen) <= {"right", "event generation_interrupted"}
    assert seen["event generation_interrupted"] <= CLIENTS


def test_a_killed_planner_fails_no_request(platform: Platform) -> None:
    seen = stricken(platform, "planner killed", lambda: kill(platform, "planner"))
    assert set(seen) == {"right"}


def test_expert_functions_fifty_times_slower_fail_no_request(platform: Platform) -> None:
    def pulses() -> None:
        """Stopped for 49 of each 50 parts of a tenth of a second, for three seconds."""
        pids = platform.pids_of("expert_fn")
        assert pids
        end = time.monotonic() + 3
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                for signum, pause_s in ((signal.SIGSTOP, 0.098), (signal.SIGCONT, 0.002)):
                    for pid in pids:
                        os.kill(pid, signum)
                    time.sleep(pause_s)

    seen = stricken(platform, "expert functions x 50 slower for 3 s", pulses)
    assert set(seen) == {"right"}


def test_half_sent_requests_are_let_go_and_hold_up_nobody(platform: Platform) -> None:
    with contextlib.ExitStack() as stack:

        def half() -> None:
            for _ in range(200):
                connection = stack.enter_context(contextlib.closing(connect(platform.port)))
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{"
                )

        seen = stricken(platform, "200 half-open requests", half)
    assert set(seen) == {"right"}


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


class SlowLoris:
    """Connections that send one letter of a header a second, from a thread of its own."""

    def __init__(self, port: int, count: int) -> None:
        self.closed_after: list[float] = []
        self._port = port
        self._count = count
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._attack()))

    def begin(self) -> None:
        """Return when all connections are open."""
        self._thread.start()
        assert self._ready.wait(60)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)

    async def _attack(self) -> None:
        gate = asyncio.Semaphore(250)
        writers: list[asyncio.StreamWriter] = []

        async def one() -> None:
            async with gate:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            began = time.monotonic()
            writer.write(b"GET / HTTP/1.1\r\nx-")
            writers.append(writer)
            if len(writers) == self._count:
                self._ready.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()
                self.closed_after.append(time.monotonic() - began)
                writer.close()

        tasks = [asyncio.create_task(one()) for _ in range(self._count)]
        while not self._stop.is_set():
            for writer in writers:
                if not writer.is_closing():
                    writer.write(b"a")
            await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_slow_connections_hold_up_nobody(platform: Platform) -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(int(os.environ.get("REMOE_SLOW_CONNECTIONS", "1000")), allowed - 500)
    attack = SlowLoris(platform.port, count)
    try:
        seen = stricken(platform, f"{count:,} slow connections", attack.begin)
        platform.wait_for(lambda: len(attack.closed_after) == count, within_s=60)
    finally:
        attack.end()
    say(f"  all closed by the gateway, the last after {max(attack.closed_after):.1f} s")
    assert set(seen) == {"right"}


def test_a_frozen_main_function_is_given_up_soon(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("REMOE_GATEWAY_SILENCE_TIMEOUT_S", "2")
    home = tmp_path_factory.mktemp("home")
    with Platform(platform.model_dir, home, "--layers-per-function", "1") as impatient:
        load = Load(impatient)
        frozen = impatient.pids_of("main_model_fn")
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as refused:
            impatient.client.completions.create(model=load.model, prompt=PROMPTS[0])
        say(f"\nmain function frozen: {refused.value.code} after {time.monotonic() - began:.2f} s")
        assert (refused.value.status_code, refused.value.code) == (504, "upstream_timeout")
        # A stream has begun by then, with a heartbeat.
        with pytest.raises(openai.APIError) as told:
            load.ask(PROMPTS[0])
        assert told.value.code == "upstream_timeout"
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        assert load.ask(PROMPTS[0]) == load.expected[PROMPTS[0]]
