"""The ledger as a client meets it: what was answered is written down, and what is not, is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
from sqlalchemy import Engine, event
from starlette.responses import PlainTextResponse

from gateway.accounting import entry_of
from gateway.events import Trace
from gateway.receipt import ChoiceRecord, build_receipt
from gateway.residency import ResidentMeter
from remoe.accounts.bill import make_bill
from remoe.accounts.database import open_database
from remoe.accounts.schema import REQUESTS
from remoe.generation import GenerateEvent, GenerateRequest, GenerationStats
from remoe.ledger import Ledger
from remoe.prices import DEFAULT_PRICES
from remoe.runtime_status import FunctionStatus, ReplicaStatus, RuntimeStatus
from remoe.topology import Topology
from tests.gateway.conftest import Stack, eventually, openai_client
from tests.gateway.fakes import Gate
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'books' / 'ledger.db'}"


@pytest.fixture
def books(ledger: str) -> Iterator[Engine]:
    engine = open_database(ledger)
    yield engine
    engine.dispose()


def rows(books: Engine) -> list[dict[str, object]]:
    with books.connect() as connection:
        found = connection.execute(REQUESTS.select().order_by(REQUESTS.c.finished_at_us))
        return [{str(k): v for k, v in row.items()} for row in found.mappings()]


def test_the_bill_is_what_the_replies_said(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger)
    receipts = []
    with openai_client(url) as client:
        for text in ("one", "one two three", "and a longer answer"):
            stack.main.say(text)
            reply = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], n=2
            )
            assert reply.model_extra is not None
            receipts.append((reply.id, reply.model_extra["x_remoe"]))
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        *_, last = stream
        receipts.append((last.id, (last.model_extra or {})["x_remoe"]))
    # The rows are there as soon as the replies are: no waiting here.
    written = {row["id"]: row for row in rows(books)}
    assert set(written) == {reply_id for reply_id, _ in receipts}
    for reply_id, receipt in receipts:
        row = written[reply_id]
        assert row["outcome"] == "finished"
        assert row["total_nano_usd"] == round(receipt["cost_usd"] * 1e9)
        assert row["remote_kb_s"] == round(receipt["remote_gb_s"] * 1e6)
        parts = ("main_gpu_nano_usd", "main_cpu_nano_usd", "remote_nano_usd")
        assert row["total_nano_usd"] == sum(int(str(row[part])) for part in parts)
    total = make_bill(books, by="model").total
    assert total.total_nano_usd == sum(round(r["cost_usd"] * 1e9) for _, r in receipts)
    assert total.requests == 4


def test_refused_requests_are_not_in_the_ledger(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger)
    assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 400
    stack.main.refusal = PlainTextResponse("activator", status_code=503)
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 503
    assert rows(books) == []


def test_a_client_that_leaves_is_written_down_as_such(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    more = Gate()

    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(
            tokens=stack.encode("Paris is a city"), ledger=Ledger(main_cpu_gb_s=2.0)
        )
        await more.passed()
        yield GenerateEvent(finish="stop")

    stack.main.script = script
    url = serve_gateway(ledger=ledger)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        assert "data:" in next(reply.iter_text())
    eventually(lambda: len(rows(books)) == 1)
    more.open()
    (row,) = rows(books)
    assert (row["outcome"], row["metered"], row["main_cpu_kb_s"]) == ("cancelled", True, 2_000_000)
    paid = round(2.0 * DEFAULT_PRICES.cpu_usd_per_gb_s * 1e9)
    assert (row["total_nano_usd"], row["main_cpu_nano_usd"]) == (paid, paid)
    assert int(str(row["completion_tokens"])) > 0


def test_a_client_that_leaves_while_its_prompt_is_read_pays_for_that(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(ledger=Ledger(main_cpu_gb_s=3.0))
        await asyncio.Event().wait()

    stack.main.script = script
    url = serve_gateway(ledger=ledger, heartbeat_s=0.05)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        assert "phase=reading" in next(line for line in reply.iter_lines() if "reading" in line)
    eventually(lambda: len(rows(books)) == 1)
    (row,) = rows(books)
    assert (row["outcome"], row["completion_tokens"]) == ("cancelled", 0)
    assert (row["metered"], row["main_cpu_kb_s"]) == (True, 3_000_000)


class _NoRoom:
    """While it is on, every write of every engine fails as on a full disk."""

    def __enter__(self) -> None:
        event.listen(Engine, "before_cursor_execute", self._fail)

    def __exit__(self, *args: object) -> None:
        event.remove(Engine, "before_cursor_execute", self._fail)

    @staticmethod
    def _fail(
        connection: object, cursor: object, statement: str, parameters: object, *_: object
    ) -> None:
        import sqlite3

        from sqlalchemy.exc import OperationalError

        if statement.startswith(("INSERT", "UPDATE")):
            reason = sqlite3.OperationalError("database or disk is full")
            raise OperationalError(statement, None, reason)


def test_a_full_disk_stops_answers_and_then_requests(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger, ledger_patience_s=0.2)
    with _NoRoom():
        whole = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "ledger_unavailable"
        assert int(whole.headers["retry-after"]) > 0
        seen = len(stack.main.requests)
        refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert refused.json()["error"]["code"] == "ledger_unavailable"
        assert len(stack.main.requests) == seen
        assert httpx.get(f"{url}/v1/models").status_code == 200
    eventually(lambda: httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200)
    assert make_bill(books, by="day").total.requests == 1


def test_a_full_disk_ends_a_stream_with_an_error(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger, ledger_patience_s=0.2)
    with _NoRoom(), openai_client(url) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        with pytest.raises(openai.APIError, match="costs nothing"):
            list(stream)
    assert rows(books) == []


def test_a_full_disk_may_be_served_through(
    stack: Stack, serve_gateway: Callable[..., str], ledger: str, books: Engine
) -> None:
    url = serve_gateway(ledger=ledger, ledger_failure="serve", ledger_patience_s=0.1)
    with _NoRoom():
        for _ in range(3):
            assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
    eventually(lambda: len(rows(books)) == 3)


def status(main_url: str, expert_url: str, **alive: int) -> RuntimeStatus:
    """Functions of 1 GB each with so many replicas; `starting` ones are the expert's."""

    def function(url: str, count: int, state: str) -> FunctionStatus:
        replicas = [
            {
                "name": "r",
                "pid": 1,
                "state": state,
                "age_s": 0,
                "in_flight": 0,
                "memory_bytes": 0,
                "mapped_bytes": 0,
            }
        ] * count
        values: dict[str, object] = {
            field.name: 0
            for field in msgspec.structs.fields(FunctionStatus)
            if field.type in {int, float}
        }
        return FunctionStatus(
            **{
                **values,
                "name": url,
                "holds": "",
                "url": url,
                "state": "ready",
                "detail": "",
                "memory_limit_bytes": 1_000_000_000,
                "last_call_s": None,
                "cold_start_last_ms": None,
                "replicas": msgspec.convert(replicas, list[ReplicaStatus]),
            }  # type: ignore[arg-type]
        )

    return RuntimeStatus(
        pid=1,
        url="http://gateway",
        model="m",
        up_s=0,
        functions=[
            function(main_url, alive.get("main", 0), "ready"),
            function(expert_url, alive.get("starting", 0), "starting"),
            function("http://planner", alive.get("services", 0), "ready"),
        ],
        events=[],
    )


def test_every_second_held_is_shared_by_those_who_are_there(topology: Topology) -> None:
    now = 0.0
    meter = ResidentMeter(topology, clock=lambda: now)
    expert_url = topology.experts[0].url
    early = meter.enter()
    assert early.share() is None
    early.leave()

    meter.update(status(topology.main_url, expert_url, main=1, services=1))
    now = 10.0  # 10 s with nobody there: 20 GB·s of keep-alive
    first = meter.enter()
    now = 14.0  # alone: 4 s of 2 GB
    second = meter.enter()
    meter.update(status(topology.main_url, expert_url, main=1, services=1, starting=1))
    now = 18.0  # two: 4 s of 3 GB, half each
    first.leave()
    now = 20.0  # the second alone: 2 s of 3 GB
    second.leave()
    now = 25.0  # nobody: 5 s of 3 GB
    one, two, idle = first.share(), second.share(), meter.take_keep_alive()
    assert one is not None
    assert two is not None
    assert one.total_gb_s == pytest.approx(8 + 6)
    assert (one.main_gb_s, one.services_gb_s, one.experts_gb_s) == pytest.approx((6, 6, 2))
    assert one.starting_gb_s == pytest.approx(2)
    assert two.total_gb_s == pytest.approx(6 + 6)
    assert idle.total_gb_s == pytest.approx(20 + 15)
    assert one.total_gb_s + two.total_gb_s + idle.total_gb_s == pytest.approx(61)
    meter.forget()
    now = 100.0
    assert meter.take_keep_alive().total_gb_s == 0


def test_an_entry_holds_the_receipt_exactly() -> None:
    stats = GenerationStats(
        queue_s=0,
        first_token_s=0,
        total_s=0,
        prompt_tokens=3,
        output_tokens=2,
        deployment_plan_id="d",
        ledger=Ledger(main_cpu_gb_s=1 / 3, remote_gb_s=2 / 7, remote_calls=3),
        prefill_counts=[[1, 0]],
        decode_counts=[[0, 1]],
    )
    receipt = build_receipt(
        received_at=0,
        asked_at=0.1,
        now=1.2345678,
        plans=[None],
        samples=1,
        records=[
            ChoiceRecord(
                tokens=2, first_token_at=0.5, last_token_at=0.75, stats=stats, used=stats.ledger
            )
        ],
        prices=DEFAULT_PRICES,
    )
    row = entry_of(Trace("r", 0.0, reply_id="c"), receipt, "finished", 1_764_000_000.25)
    assert (row.main_cpu_kb_s, row.remote_kb_s) == (333_333, 285_714)
    # 0.333333 GB·s x 0.000023 USD and 0.285714 GB·s x 0.000023 USD, each to a nano-dollar.
    assert (row.main_cpu_nano_usd, row.remote_nano_usd, row.total_nano_usd) == (7667, 6571, 14238)
    assert (row.ttft_us, row.tpot_us, row.total_us) == (500_000, 250_000, 1_234_568)
    assert (row.day, row.key_id) == ("2025-11-24", "-")


def test_metering_off_writes_nothing(
    stack: Stack, serve_gateway: Callable[..., str], tmp_path: Path
) -> None:
    url = serve_gateway()
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
    assert not list(tmp_path.rglob("*.db"))
