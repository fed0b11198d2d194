"""Calls that leave within a native step: the same answers and bills, whatever the function does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from transformers import PreTrainedModel

from main_model_fn.express import ExpressLine
from main_model_fn.http_transport import HttpTransport
from main_model_fn.metering import StepMeter
from main_model_fn.native_stop import Stop
from remoe.kernel.native_library import NativePool
from remoe.ledger import Ledger
from remoe.topology import Topology
from tests.main_model_fn.asking import ask, collect, generate, random_prompt, serving
from tests.processes import ExpertProcess
from tests.rogue import Fault, Rogue
from tests.tiny_model import LAYERS, native, new_meter

_REMOTE = ((0, 1), (0, 1, 2, 3), (2,))
_PROMPT, _TOKENS = random_prompt(3, 12), 24
_FAULTS: list[Fault] = [
    "garbage", "not_msgpack", "short", "endless", "dribbles", "closes", "resets", "silent"
]  # fmt: skip


@pytest.fixture(scope="module", params=["port", "socket"])
def function(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExpertProcess]:
    with ExpertProcess(
        tiny_model_dir,
        tmp_path_factory.mktemp("e"),
        last_layer=LAYERS - 1,
        local_socket=request.param == "socket",
    ) as process:
        yield process


@pytest.fixture(scope="module")
def expected(unmodified: PreTrainedModel) -> list[int]:
    return generate(unmodified, _PROMPT, _TOKENS)


@dataclasses.dataclass
class Stops:
    """Counts layers at which a step stopped for Python, and those of them whose call had left."""

    all: int = 0
    posted: int = 0

    @classmethod
    @contextlib.contextmanager
    def counted(cls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stops]:
        stops, elsewhere = cls(), Stop.elsewhere

        def counting(self: Stop) -> object:
            stops.all += 1
            stops.posted += self.posted is not None
            return elsewhere(self)

        with monkeypatch.context() as patch:
            patch.setattr(Stop, "elsewhere", counting)
            yield stops


def answer(
    model_dir: Path, topology: Topology, pool: NativePool, *, hedge_floor_s: float = 5
) -> tuple[list[int], Ledger]:
    """Tokens, and what they were billed."""
    transport = HttpTransport(topology, timeout_s=20, hedge_floor_s=hedge_floor_s)
    meter: StepMeter = new_meter()
    model = native(model_dir, _REMOTE, cast("Any", transport), meter, pool)
    try:
        with serving(model, meter) as engine:
            tokens, end = asyncio.run(collect(engine, ask(_PROMPT, tokens=_TOKENS)))
    finally:
        transport.close()
    assert end.stats is not None
    return tokens, end.stats.ledger


def test_a_decoding_step_calls_by_itself_and_is_billed_as_ever(
    tiny_model_dir: Path,
    function: ExpertProcess,
    pool: NativePool,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Stops.counted(monkeypatch) as stops:
        tokens, bill = answer(tiny_model_dir, function.topology, pool)
    with monkeypatch.context() as patch:
        patch.setattr(HttpTransport, "line", lambda *_: None)
        with Stops.counted(patch) as all_stops:
            slowly, their_bill = answer(tiny_model_dir, function.topology, pool)
    assert tokens == slowly == expected
    assert stops.all < all_stops.all / 3
    for name in ("remote_calls", "remote_rows", "local_fallbacks", "remote_retries"):
        assert getattr(bill, name) == getattr(their_bill, name)
    # Numbers that MessagePack could write shorter are written in full.
    assert 0 <= bill.remote_bytes - their_bill.remote_bytes <= 8 * bill.remote_calls
    assert bill.remote_gb_s > 0


@pytest.mark.parametrize("function", ["port"], indirect=True)
@pytest.mark.parametrize("fault", _FAULTS)
def test_a_reply_that_is_not_as_the_last_one_is_any_calls_business(
    tiny_model_dir: Path,
    function: ExpertProcess,
    pool: NativePool,
    expected: list[int],
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes in the middle of an answer, to a call that has left within the step."""
    opened, calls = ExpressLine.open, 0
    with Rogue(function.port) as rogue:

        def soon_wrong(self: ExpressLine, now: float, remaining_s: float | None) -> None:
            nonlocal calls
            calls += 1
            if calls == 20:
                rogue.fault, rogue.faults_left = fault, 1
            opened(self, now, remaining_s)

        monkeypatch.setattr(ExpressLine, "open", soon_wrong)
        url = f"http://127.0.0.1:{rogue.port}"
        experts = [msgspec.structs.replace(one, url=url) for one in function.topology.experts]
        topology = msgspec.structs.replace(function.topology, experts=experts)
        with Stops.counted(monkeypatch) as stops:
            tokens, bill = answer(tiny_model_dir, topology, pool, hedge_floor_s=0.2)
        assert rogue.faults == 1
    assert tokens == expected
    assert stops.posted
    assert bill.remote_retries + bill.remote_hedges + bill.local_fallbacks >= 1


def test_a_replica_that_dies_between_two_tokens_costs_a_retry(
    tiny_model_dir: Path,
    function: ExpertProcess,
    pool: NativePool,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, calls = ExpressLine.open, 0

    def dies(self: ExpressLine, now: float, remaining_s: float | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            function.kill()
            threading.Thread(target=function.start).start()
        opened(self, now, remaining_s)

    monkeypatch.setattr(ExpressLine, "open", dies)
    tokens, bill = answer(tiny_model_dir, function.topology, pool)
    assert tokens == expected
    assert bill.remote_retries >= 1
    assert bill.local_fallbacks == 0
