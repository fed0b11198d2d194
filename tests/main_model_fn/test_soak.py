"""200 requests of every kind through real expert functions that die, freeze and refuse.

No wrong token, no stuck request, and at the end nothing is left: cache pages, sockets, memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.http_transport import HttpTransport
from main_model_fn.native_model import NativeModel
from main_model_fn.served_model import load_served_model
from remoe.experts import Partition
from remoe.generation import GenerateRequest, GenerationStats, SamplingParams
from remoe.kernel.native_library import NativePool
from remoe.topology import Topology
from tests.main_model_fn.asking import GREEDY, Pages, ask, collect, generate, random_prompt
from tests.processes import ExpertProcess
from tests.tiny_model import EXPERTS, LAYERS, new_meter

REQUESTS = 200
AT_ONCE = 8
LIMITS = EngineLimits(kv_tokens=1024, page_tokens=16, batch_tokens=64, max_requests=8, max_queue=8)
REMOTE = ((0, 1, 2), (1, 3), (0, 2, 3))
# A call to a frozen function gives up after this; faults last about as long.
CALL_TIMEOUT_S = 0.25
FAULT_S = 0.2
PEACE_S = 0.6
# After the first requests Python, torch and malloc have taken what they take.
WARM_UP = 60
MAX_GROWTH_MIB = 8  # measured: 0.1 to 0.2


@dataclass(frozen=True)
class Job:
    request: GenerateRequest
    expected: list[int]
    leave_after: int | None  # events, of a client that goes away


@dataclass
class Tally:
    completed: int = 0
    abandoned: int = 0
    expired: int = 0
    remote_calls: int = 0
    local_fallbacks: int = 0
    retries: int = 0

    def add(self, stats: GenerationStats) -> None:
        self.completed += 1
        self.remote_calls += stats.ledger.remote_calls
        self.local_fallbacks += stats.ledger.local_fallbacks
        self.retries += stats.ledger.remote_retries


def memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def open_files() -> Counter[str]:
    """What is open, sockets without their numbers."""
    gc.collect()  # what earlier tests have left to it
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.append(str(entry.readlink()).split(":")[0])
    return Counter(names)


def sampling_of(rng: random.Random) -> SamplingParams:
    """Greedy for a half of them; the others each their own way, and seeded."""
    if rng.random() < 0.5:
        return GREEDY
    return SamplingParams(
        temperature=rng.choice([0.6, 1.0, 1.4]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 20]),
        min_p=rng.choice([0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.6]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias=rng.choice([{}, {3: -2.0}]),
        seed=rng.randrange(2**40),
    )


def request_of(rng: random.Random) -> GenerateRequest:
    """A third of the prompts begin with one of four, whose pages they share."""
    prompt = random_prompt(rng.randrange(10**6), rng.randint(1, 90))
    if rng.random() < 0.35:
        prompt = random_prompt(rng.randrange(4), 50) + prompt
    return ask(
        prompt,
        tokens=rng.randint(1, 20),
        sampling=sampling_of(rng),
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None] * 5 + [0]),
        running_stats=rng.random() < 0.5,
    )


async def run(engine: Engine, job: Job, tally: Tally) -> None:
    """Ask as a client does, and check every token that comes."""
    tokens: list[int] = []
    async with aclosing(engine.generate(job.request)) as events:
        count = 0
        async for event in events:
            if event.finish == "error":
                assert job.request.deadline_s is not None, event.error
                assert event.error is not None
                assert "deadline" in event.error
                tally.expired += 1
                break
            tokens += event.tokens
            assert len(event.logprobs) == (0 if job.request.logprobs is None else len(event.tokens))
            if event.finish is not None:
                assert tokens == job.expected
                assert event.stats is not None
                tally.add(event.stats)
            count += 1
            if count == job.leave_after:
                tally.abandoned += 1
                break
    assert tokens == job.expected[: len(tokens)]


class Faults:
    """Does one thing after another to one expert function after another."""

    def __init__(self, functions: tuple[ExpertProcess, ...]) -> None:
        self._functions = functions
        self.done = {"killed": 0, "frozen": 0, "refused": 0}
        self.over = False

    async def run(self) -> None:
        """Until `over`; what has been begun is ended, so that every function is there again."""
        faults = itertools.cycle((self._kill, self._freeze, self._refuse))
        for fault, function in zip(faults, itertools.cycle(self._functions), strict=False):
            await asyncio.sleep(PEACE_S)
            if self.over:
                return
            await fault(function)

    async def _kill(self, function: ExpertProcess) -> None:
        """Its address holds callers until it is there again."""
        function.kill()
        await asyncio.sleep(FAULT_S)
        function.start()
        self.done["killed"] += 1

    async def _freeze(self, function: ExpertProcess) -> None:
        function.stop_reading()
        await asyncio.sleep(2 * FAULT_S)
        function.process.send_signal(signal.SIGCONT)
        self.done["frozen"] += 1

    async def _refuse(self, function: ExpertProcess) -> None:
        function.kill()
        function.close_port()
        await asyncio.sleep(FAULT_S)
        function.open_port()
        function.start()
        self.done["refused"] += 1


async def all_requests(engine: Engine, jobs: list[Job], tally: Tally) -> None:
    waiting = iter(jobs)

    async def client() -> None:
        for job in waiting:
            await run(engine, job, tally)

    async with asyncio.TaskGroup() as clients:
        for _ in range(AT_ONCE):
            clients.create_task(client())


async def under_faults(engine: Engine, jobs: list[Job], faults: Faults) -> Tally:
    tally = Tally()
    trouble = asyncio.ensure_future(faults.run())
    try:
        async with asyncio.timeout(60):
            await all_requests(engine, jobs[:WARM_UP], tally)
            before = memory_mib()
            await all_requests(engine, jobs[WARM_UP:], tally)
            while not all(faults.done.values()):  # where steps are short
                await all_requests(engine, jobs[WARM_UP:], tally)
            await Pages(engine).become_idle()
    finally:
        faults.over = True
        await trouble
    growth_mib = memory_mib() - before
    assert growth_mib < MAX_GROWTH_MIB
    return tally


@pytest.fixture
def functions(tiny_model_dir: Path, tmp_path: Path) -> Iterator[tuple[ExpertProcess, ...]]:
    """Two: one for the first layer, one for the others."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with (
        ExpertProcess(tiny_model_dir, folders[0], last_layer=LAYERS - 1) as first,
        ExpertProcess(tiny_model_dir, folders[1], last_layer=LAYERS - 1) as second,
    ):
        yield first, second


def topology_of(functions: tuple[ExpertProcess, ...]) -> Topology:
    first, second = (function.topology.experts[0] for function in functions)
    return msgspec.structs.replace(
        functions[0].topology,
        experts=[
            msgspec.structs.replace(first, name="tiny-0", last_layer=0),
            msgspec.structs.replace(second, name="tiny-1", first_layer=1),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("natively", [False, True])
def test_soak(
    tiny_model_dir: Path,
    unmodified: PreTrainedModel,
    functions: tuple[ExpertProcess, ...],
    pool: NativePool,
    natively: bool,
) -> None:
    files_before = open_files()
    transport = HttpTransport(topology_of(functions), timeout_s=CALL_TIMEOUT_S)
    meter = new_meter()
    model = load_served_model(
        tiny_model_dir,
        partition=Partition(experts=EXPERTS, remote=REMOTE),
        dtype=torch.float32,
        device=torch.device("cpu"),
        transport=transport,
        function_memory_gb=dict.fromkeys(range(LAYERS), 0.5),
        meter=meter,
        pool=pool if natively else None,
    )
    assert isinstance(model, NativeModel) is natively
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    try:
        jobs = []
        rng = random.Random(20)
        for _ in range(REQUESTS):
            request = request_of(rng)
            if request.sampling == GREEDY:
                expected = generate(unmodified, request.prompt_tokens, request.max_new_tokens)
            else:
                expected, _ = asyncio.run(collect(engine, request))
            leaves = rng.random() < 0.25
            if not leaves and rng.random() < 0.1:
                request = msgspec.structs.replace(request, deadline_s=rng.uniform(0.0, 0.05))
            jobs.append(Job(request, expected, leave_after=rng.randint(1, 8) if leaves else None))
        faults = Faults(functions)
        tally = asyncio.run(under_faults(engine, jobs, faults))
    finally:
        engine.stop()
        transport.close()
    # A client may leave at the very last event, and then counts twice.
    assert tally.completed + tally.abandoned + tally.expired >= REQUESTS
    assert tally.abandoned > 20
    assert tally.expired > 0
    assert min(faults.done.values()) >= 1
    assert tally.remote_calls > 500
    assert tally.local_fallbacks > 10
    assert engine._open == 0
    del model, engine, transport
    assert not open_files() - files_before
