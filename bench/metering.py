"""What the ledger costs: gateways that write it and gateways that do not, in turns.

    python bench/metering.py --model DIR [--interval-ms 20] [--rounds 40] [--postgresql URL]

All have the same main function behind them, which streams a token every 20 ms, as a model does; with
`--interval-ms 0` as fast as they go, which leaves of a request little but its row. A round sends the
same streams to each gateway, in an order that changes from round to round. Gateways have a
processor of their own, load and main function another. Processor time is the scheduler's, of all
threads, in nanoseconds. Each ratio is the median over rounds of a gateway's time over the first
one's in the same round, with its 95 % confidence interval; two gateways without a ledger show how
far two equal ones are apart. The target is 1.03 at most (processor time).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.streaming.clients import load
from bench.streaming.processes import Running, gateway, upstream
from remoe.accounts.database import open_database
from remoe.accounts.entries import Entry
from remoe.accounts.writer import LedgerWriter

MODEL = "model"
STREAMS = 32
# Of a fast answer more are needed for a round to take a while.
ANSWERS_EACH, FAST_ANSWERS_EACH = 1, 8
WARM_UP_ROUNDS = 2
ENTRY = msgspec.convert(
    {
        field.name: {int: 1, str: "bench", bool: True}.get(field.type)
        for field in msgspec.structs.fields(Entry)
    }
    | {"outcome": "finished"},
    Entry,
)


def round_s(started: Running, *, answers: int, tokens: int) -> tuple[float, float]:
    """Processor and wall seconds that some streams take a gateway."""
    before, began = started.scheduled_s(), time.perf_counter()
    load(started.port, MODEL, clients=STREAMS, rounds=answers, tokens=[tokens])
    return started.scheduled_s() - before, time.perf_counter() - began


def measure(gateways: dict[str, Running], *, rounds: int, answers: int, tokens: int) -> float:
    """Print processor and wall time in turns; returns a request's processor seconds without."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in gateways}
    names = list(gateways)
    for number in range(WARM_UP_ROUNDS + rounds):
        # In any order: a gateway feels whose turn was before its own.
        for name in random.sample(names, len(names)):
            found = round_s(gateways[name], answers=answers, tokens=tokens)
            if number >= WARM_UP_ROUNDS:
                taken[name].append(found)
    requests = STREAMS * answers
    for name, found in taken.items():
        cpu_s, wall_s = (statistics.median(values) for values in zip(*found, strict=True))
        print(
            f"{name:12} {cpu_s / requests * 1e3:7.3f} ms of processor a request, "
            f"{requests / wall_s:7.1f} requests/s"
        )
    for name in names[1:]:
        for part, what in enumerate(("processor time", "wall time")):
            ratios = [a[part] / b[part] for a, b in zip(taken[name], taken["off"], strict=True)]
            low, high = interval(ratios)
            print(f"{name} / off: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) {what}")
    return statistics.median(cpu_s for cpu_s, _ in taken["off"]) / requests


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median is with 95 % confidence, by ranks: whatever the distribution."""
    ordered, count = sorted(values), len(values)
    first = max(0, math.floor(count / 2 - 1.96 * math.sqrt(count) / 2))
    return ordered[first], ordered[count - 1 - first]


async def row_cost_s(url: str) -> float:
    """Processor seconds that `record` takes for a row, at 200 requests a second, without gateways."""
    writer = LedgerWriter(open_database(url))
    named = msgspec.structs.asdict(ENTRY)

    async def client(name: str, *, recorded: bool) -> None:
        for number in range(25):
            await asyncio.sleep(STREAMS / 200)
            entry = Entry(**{**named, "id": f"{name}-{number}"})
            if recorded:
                await writer.record(entry)

    async def rows(name: str, *, recorded: bool) -> float:
        before = time.process_time()
        async with asyncio.TaskGroup() as group:
            for stream in range(STREAMS):
                group.create_task(client(f"{name}-{stream}", recorded=recorded))
        return (time.process_time() - before) / (25 * STREAMS)

    differences = [
        await rows(f"{number}", recorded=True) - await rows("", recorded=False)
        for number in range(3)
    ]
    await writer.close()
    return statistics.median(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder, for its tokenizer")
    parser.add_argument("--interval-ms", type=float, default=20, help="between two tokens")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--postgresql", help="measure this database too")
    options = parser.parse_args()
    *_, first, second = (0, *sorted(os.sched_getaffinity(0)))  # the same one if there is only one
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        interval_s = options.interval_ms / 1e3
        behind = exits.enter_context(upstream(options.model, interval_s=interval_s))
        behind.pin(second)
        ledgers = {"off": "", "control": "", "sqlite": f"sqlite:///{folder / 'ledger.db'}"}
        if options.postgresql:
            ledgers["postgresql"] = options.postgresql
        gateways = {}
        for name, ledger in ledgers.items():
            variables = {"REMOE_GATEWAY_LEDGER": ledger} if ledger else {}
            started = exits.enter_context(
                gateway(MODEL, options.model, behind.port, folder=folder, **variables)
            )
            started.pin(first)
            gateways[name] = started
        os.sched_setaffinity(0, {second})
        answers = ANSWERS_EACH if interval_s else FAST_ANSWERS_EACH
        request_s = measure(gateways, rounds=options.rounds, answers=answers, tokens=options.tokens)
        row_s = asyncio.run(row_cost_s(f"sqlite:///{folder / 'direct.db'}"))
        print(f"one row by itself: {row_s * 1e6:.0f} us, {row_s / request_s:.1%} of such a request")


if __name__ == "__main__":
    main()
