"""Requests of every kind at the machine's capacity, with a fault every few seconds, for a long time.

    python bench/soak.py --requests 20000

Starts the platform as users do (a tiny random model, an expert function a layer), learns the right
answer of each kind of request, then asks them all at once and at random: chat and completions,
streamed and whole, several choices, stop strings, log-probabilities, schemas, tools, and clients
that leave. Meanwhile processes are killed and frozen. It fails if an answer was wrong, if a finished
answer is not in the ledger with the very amounts that its client was told, if the gateway's or the
supervisor's memory grows, or if any process has more files open than before the load once idle
connections are closed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import psutil
from tokenizers import Tokenizer

from remoe.accounts.database import open_database
from remoe.accounts.schema import REQUESTS
from tests.e2e.platform import Platform
from tests.gateway.tiny_text import write_model
from tests.tiny_model import build_tiny_checkpoint

PROMPTS = ["The capital of France", "Cold experts sleep", "a model answers", "Hello world, hello"]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["hot", "cold"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "wake", "parameters": SCHEMA}}
# The share of streams whose client leaves in the middle.
LEAVES = 0.05
SAMPLE_PERIOD_S = 2.0
# Longer than the gateway keeps idle connections, which it looks for every 30 s.
SETTLE_S = 70.0
MAIN_LIVES_S = 60.0
MAX_GROWTH_MIB = 16.0
MAX_OPEN_MORE = 4
ROLES = ("gateway", "planner", "main_model_fn", "expert_fn")


@dataclass(frozen=True)
class Kind:
    """One request body; its answer is always the same."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass
class Reply:
    """What a client has of an answer."""

    id: str = ""
    texts: dict[str, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, str] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    error: str | None = None
    left: bool = False
    done: bool = False

    @property
    def answer(self) -> tuple[dict[str, str], dict[int, str]]:
        return dict(self.texts), self.finishes


def kinds(model: str) -> list[Kind]:
    made = []
    for number, prompt in enumerate(PROMPTS):
        for stream in (True, False):
            # No answer ends by chance; each is as long as it may be.
            common = {"model": model, "temperature": 0, "logit_bias": {"2": -100}, "stream": stream}
            chat = {**common, "messages": [{"role": "user", "content": prompt}], "seed": number}
            shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
            free = {key: value for key, value in chat.items() if key != "logit_bias"}
            bodies = {
                "completion": {**common, "prompt": prompt, "max_tokens": 8 + 4 * number},
                "prompts": {**common, "prompt": PROMPTS[: number + 1], "max_tokens": 6},
                "chat": {**chat, "max_tokens": 16},
                "sampled": {**chat, "temperature": 1.0, "n": 2, "max_tokens": 10},
                "stop": {**chat, "stop": ["e", "s"], "max_tokens": 24},
                "logprobs": {**chat, "logprobs": True, "top_logprobs": 3, "max_tokens": 8},
                "schema": {**free, "response_format": shape, "max_tokens": 60},
                "tool": {**free, "tools": [TOOL], "tool_choice": "required", "max_tokens": 80},
                "long": {**chat, "messages": [{"role": "user", "content": prompt * 20}]}
                | {"max_tokens": 4},
            }
            for name, body in bodies.items():
                path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
                made.append(Kind(f"{name}-{number}{'-stream' * stream}", path, body))
    return made


async def ask(http: aiohttp.ClientSession, kind: Kind, leave_after: int | None = None) -> Reply:
    """Ask once; `leave_after` chunks the client is gone."""
    reply = Reply()
    try:
        async with http.post(kind.path, json=kind.body) as response:
            if not kind.body["stream"] or response.status != 200:
                told = msgspec.json.decode(await response.read())
                _take(reply, told, "message")
                reply.done = reply.error is None
                return reply
            count = 0
            async for data in _events(response):
                if data == b"[DONE]":
                    reply.done = reply.error is None
                    continue
                _take(reply, msgspec.json.decode(data), "delta")
                count += 1
                if count == leave_after:
                    reply.left = True
                    return reply
            if not reply.done and reply.error is None:
                reply.error = "cut off"
    except (aiohttp.ClientError, TimeoutError) as error:
        reply.error = type(error).__name__
    return reply


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].strip()


def _take(reply: Reply, told: dict[str, Any], part: str) -> None:
    if "error" in told:
        reply.error = str(told["error"]["code"])
        return
    reply.id = told["id"]
    reply.receipt = told.get("x_remoe") or reply.receipt
    for choice in told["choices"]:
        said = choice.get(part) or {}
        index = choice["index"]
        reply.texts[f"{index}"] += choice.get("text") or said.get("content") or ""
        # Texts of their own: how these fall into chunks beside it depends on when tokens come.
        for call in said.get("tool_calls") or []:
            function = call["function"]
            called = (function.get("name") or "") + (function.get("arguments") or "")
            reply.texts[f"{index} calls"] += called
        scored = (choice.get("logprobs") or {}).get("content") or []
        reply.texts[f"{index} logprobs"] += "".join(f"|{entry['token']}" for entry in scored)
        if choice.get("finish_reason"):
            reply.finishes[choice["index"]] = choice["finish_reason"]


@dataclass(frozen=True)
class Sample:
    """A process when `over` requests were over; its open files by path, or kind if they have none."""

    over: int
    rss_mib: float
    files: Counter[str]


@dataclass
class Watch:
    """Memory and open files of every process."""

    platform: Platform
    over: int = 0
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    before: dict[str, Counter[str]] = field(default_factory=dict)
    """The open files of each role, before the load."""

    def look(self) -> None:
        found = [("supervisor", self.platform.process.pid)]
        found += [(role, pid) for role in ROLES for pid in self._pids(role)]
        for role, pid in found:
            with contextlib.suppress(psutil.Error, OSError):  # it ended just now
                rss_mib = psutil.Process(pid).memory_info().rss / 2**20
                self.samples[role, pid].append(Sample(self.over, rss_mib, _open_files(pid)))

    def _pids(self, role: str) -> list[int]:
        with contextlib.suppress(OSError):  # one ended just now
            return self.platform.pids_of(role)
        return []

    def load_begins(self) -> None:
        self.look()
        self.before = {role: self.files(role) for role in ("supervisor", *ROLES)}

    def files(self, role: str) -> Counter[str]:
        """What the role's newest process had open when it was last looked at."""
        lives = [taken for (name, _), taken in self.samples.items() if name == role]
        return lives[-1][-1].files if lives else Counter()

    def most_files(self, role: str) -> int:
        return max(
            sample.files.total()
            for (name, _), taken in self.samples.items()
            if name == role
            for sample in taken
        )

    def settle(self) -> None:
        """Look on until idle connections must have been closed."""
        ends_at = time.monotonic() + SETTLE_S
        while time.monotonic() < ends_at:
            time.sleep(SAMPLE_PERIOD_S)
            self.look()

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(SAMPLE_PERIOD_S)

    def growth_mib(self, role: str) -> tuple[float, float]:
        """Of the longest-lived process: growth over the second half of its life under load by a
        straight line, and its last memory."""
        lives = [taken for (name, _), taken in self.samples.items() if name == role]
        longest = [sample for sample in max(lives, key=len) if sample.over < self.over]
        half = [(sample.over, sample.rss_mib) for sample in longest[len(longest) // 2 :]]
        if len(half) < 3:
            return 0.0, half[-1][1] if half else 0.0
        overs, rss_mib = np.asarray(half, dtype=float).T  # [samples] each
        if np.ptp(overs) == 0:
            return 0.0, longest[-1].rss_mib
        slope = float(np.polyfit(overs, rss_mib, 1)[0])
        return slope * float(np.ptp(overs)), longest[-1].rss_mib


def _open_files(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            found[entry.readlink().name.partition(":[")[0]] += 1
    return found


class Faults:
    """Something breaks every few seconds; most often what there is most of."""

    def __init__(self, platform: Platform, every_s: float) -> None:
        self.done: Counter[str] = Counter()
        self._platform = platform
        self._every_s = every_s
        self._main_killed_at = time.monotonic()
        self._choices = {
            "experts killed": 10,
            "experts frozen": 6,
            "half-sent requests": 3,
            "planner killed": 2,
            "main function killed": 1,
        }

    async def run(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * self._every_s)
            (name,) = random.choices(list(self._choices), list(self._choices.values()))
            if name == "main function killed":
                # One that is killed again and again as it starts is given up, with 503s.
                if time.monotonic() - self._main_killed_at < MAIN_LIVES_S:
                    continue
                self._main_killed_at = time.monotonic()
            self.done[name] += 1
            with contextlib.suppress(OSError):
                await self._strike(name)

    async def _strike(self, name: str) -> None:
        pids = self._platform.pids_of
        if name == "experts killed":
            _signal(random.sample(found, 1) if (found := pids("expert_fn")) else [], signal.SIGKILL)
        elif name == "experts frozen":
            frozen = pids("expert_fn")
            _signal(frozen, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.3)
            finally:
                _signal(frozen, signal.SIGCONT)
        elif name == "half-sent requests":
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", self._platform.port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-len")
                await writer.drain()
                writer.close()
        else:
            module = "planner" if name == "planner killed" else "main_model_fn"
            _signal(pids(module), signal.SIGKILL)


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@dataclass
class Result:
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0


async def soak(platform: Platform, watch: Watch, options: argparse.Namespace) -> Result:
    result = Result()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{platform.port}", timeout=timeout) as http:
        async with http.get("/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        known: list[tuple[Kind, Reply]] = []
        for kind in kinds(model):
            right = await ask(http, kind)
            assert right.done, (kind.name, right.error)
            known.append((kind, right))
            result.replies.append(right)
        watch.load_begins()
        faults = Faults(platform, options.fault_every_s)
        began = time.monotonic()
        ends_at = began + options.minutes * 60
        numbers = iter(range(options.requests))

        async def client() -> None:
            for _ in numbers:
                if time.monotonic() > ends_at:
                    return
                kind, right = random.choice(known)
                leaves = kind.body["stream"] and random.random() < LEAVES
                reply = await ask(http, kind, random.randint(1, 6) if leaves else None)
                watch.over += 1
                _judge(result, kind, right, reply)

        others = [asyncio.create_task(faults.run()), asyncio.create_task(watch.run())]
        try:
            await asyncio.gather(*(client() for _ in range(options.clients)))
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        result.seconds = time.monotonic() - began
        print(f"faults: {dict(faults.done)}")
    return result


def _judge(result: Result, kind: Kind, right: Reply, reply: Reply) -> None:
    result.replies.append(reply)
    if reply.done and reply.answer == right.answer:
        result.outcomes["right"] += 1
        return
    begun = all(right.texts[index].startswith(text) for index, text in reply.texts.items())
    if reply.done or not begun:
        result.outcomes["WRONG"] += 1
        result.wrong.append(f"{kind.name}: {reply.answer} instead of {right.answer}")
    else:
        result.outcomes["left" if reply.left else f"told: {reply.error}"] += 1


def check_ledger(home: Path, replies: list[Reply]) -> list[str]:
    """What the ledger has against what clients were told, to the last nano-dollar."""
    engine = open_database(f"sqlite:///{home / 'ledger.db'}")
    with engine.connect() as connection:
        rows = {row["id"]: row for row in connection.execute(REQUESTS.select()).mappings()}
    engine.dispose()
    problems = []
    finished = [reply for reply in replies if reply.done]
    for reply in finished:
        row, receipt = rows.get(reply.id), reply.receipt or {}
        if row is None or row["outcome"] != "finished":
            problems.append(f"{reply.id} is not in the ledger as finished")
        elif row["total_nano_usd"] != round(receipt["cost_usd"] * 1e9):
            problems.append(f"{reply.id} costs {row['total_nano_usd']}, not {receipt['cost_usd']}")
    left = [reply for reply in replies if reply.left]
    problems += [f"{reply.id}, broken off, is not there" for reply in left if reply.id not in rows]
    unmetered = sum(not row["metered"] for row in rows.values())
    print(
        f"ledger: {len(rows):,} rows; {len(finished):,} finished answers and {len(left):,} that "
        f"were left, {len(problems)} of them missing or different; {unmetered} unmetered"
    )
    return problems


def check_processes(watch: Watch) -> list[str]:
    problems = []
    for role in ("supervisor", *ROLES):
        growth_mib, rss_mib = watch.growth_mib(role)
        before, after = watch.before[role], watch.files(role)
        more = after - before
        print(
            f"{role:14} {rss_mib:7.1f} MiB, {growth_mib:+6.1f} in the second half of the longest "
            f"life; {before.total()} files open before the load, {watch.most_files(role)} at most, "
            f"{after.total()} afterwards, of them new: {dict(more)}"
        )
        # The others were killed now and then.
        if role in {"supervisor", "gateway"} and growth_mib > MAX_GROWTH_MIB:
            problems.append(f"{role} grew by {growth_mib:.1f} MiB")
        if after.total() > before.total() + MAX_OPEN_MORE:
            problems.append(f"{role} has {after.total()} files open, {before.total()} before")
    return problems


@contextlib.contextmanager
def tiny_platform() -> Iterator[Platform]:
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name, "tiny-moe"), Path(name, "home")
        folder.mkdir()
        home.mkdir()
        write_model(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        build_tiny_checkpoint(folder, vocabulary=tokenizer.get_vocab_size())
        (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
        with Platform(folder, home, "--layers-per-function", "1") as platform:
            yield platform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=30, help="stop asking after so long")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once")
    parser.add_argument("--fault-every-s", type=float, default=4, help="on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tiny_platform() as platform:
        watch = Watch(platform)
        result = asyncio.run(soak(platform, watch, options))
        asked = sum(result.outcomes.values())
        print(
            f"{asked:,} requests in {result.seconds:.0f} s, {asked / result.seconds:.1f} a second, "
            f"{options.clients} at once: {dict(result.outcomes)}"
        )
        problems = [*result.wrong, *check_ledger(platform.home, result.replies)]
        watch.settle()
        problems += check_processes(watch)
    for problem in problems[:20]:
        print(f"PROBLEM: {problem[:1000]}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
