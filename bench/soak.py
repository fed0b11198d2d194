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
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer

from bench.soaking.faults import Faults
from bench.soaking.requests import Kind, Reply, ask, kinds
from bench.soaking.watch import ROLES, Watch
from remoe.accounts.database import open_database
from remoe.accounts.schema import REQUESTS
from tests.e2e.platform import Platform
from tests.gateway.tiny_text import write_model
from tests.tiny_model import build_tiny_checkpoint

# The share of streams whose client leaves in the middle.
LEAVES = 0.05
MAX_GROWTH_MIB = 16.0
MAX_OPEN_MORE = 4


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
