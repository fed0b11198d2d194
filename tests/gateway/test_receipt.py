"""`x_remoe`: sums, units, predictions, and what is said when something is not known."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import msgspec
import pytest

from gateway.receipt import ChoiceRecord, _resident, build_receipt
from gateway.residency import ResidentShare
from remoe.generation import GenerateEvent, GenerateRequest
from remoe.ledger import Ledger
from remoe.money import Usage
from remoe.prices import DEFAULT_PRICES
from tests.gateway.conftest import Stack
from tests.gateway.fakes import Gate, stats
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def receipt_of(reply: httpx.Response) -> dict[str, object]:
    assert reply.status_code == 200, reply.text
    receipt = reply.json()["x_remoe"]
    assert isinstance(receipt, dict)
    return receipt


def test_a_warm_request(stack: Stack, http: httpx.Client) -> None:
    stack.main.say("one two three")
    tokens = len(stack.encode("one two three"))
    receipt = receipt_of(http.post("/v1/chat/completions", json=CHAT))
    main_gb_s = 1.0 + 2.0 * tokens
    prompt = len(stack.main.requests[0].prompt_tokens)
    gpu, cpu = DEFAULT_PRICES.gpu_usd_per_gb_s, DEFAULT_PRICES.cpu_usd_per_gb_s
    assert gpu is not None
    cost = {"main_gpu_usd": gpu, "main_cpu_usd": 2 * tokens * cpu, "remote_usd": 0.5 * cpu}
    measured = {
        name: receipt.pop(name) for name in ("ttft_ms", "tpot_ms", "gateway_ms", "total_ms")
    }
    # The fake's tokens may all arrive together.
    assert all(isinstance(value, float) and value >= 0 for value in measured.values())
    assert measured["gateway_ms"] < measured["ttft_ms"]  # type: ignore[operator]
    assert receipt == {
        "plan_id": "plan-1",
        "plan": "planned",
        "deployment_plan_id": "deployed-1",
        "queue_ms": 250.0,
        "cold_start_ms": 125.0,
        "cold_start": {
            "main_ms": 0.0,
            "activation_ms": 0.0,
            "boot_ms": 0.0,
            "load_ms": 0.0,
            "experts_ms": 125.0,
        },
        "remote_calls": 3,
        "remote_bytes": 1000,
        "remote_retries": 1,
        "remote_hedges": 2,
        "local_fallbacks": 2,
        # The fake routes the prompt to the local expert and the answer to the remote one.
        "hit_rate": pytest.approx(prompt / (prompt + tokens), abs=1e-6),
        "main_gb_s": main_gb_s,
        "main_gpu_gb_s": 1.0,
        "main_cpu_gb_s": 2.0 * tokens,
        "remote_gb_s": 0.5,
        "cost_usd": pytest.approx(sum(cost.values())),
        "cost": pytest.approx(cost),
        "resident": None,
        "price_book": DEFAULT_PRICES.name,
        "predicted": {"ttft_ms": 500.0, "tpot_ms": 62.5, "cost_usd": 0.001, "hit_rate": 0.75},
    }


def test_choices_are_added_up(stack: Stack, http: httpx.Client) -> None:
    stack.main.say("one")
    body = {"model": MODEL, "prompt": ["a", "b"], "n": 3}
    receipt = receipt_of(http.post("/v1/completions", json=body))
    assert receipt["remote_calls"] == 6 * 3
    assert receipt["remote_gb_s"] == 6 * 0.5
    # Two plans, three samples of each.
    assert receipt["predicted"] == {
        "ttft_ms": 500.0,
        "tpot_ms": 62.5,
        "cost_usd": 0.006,
        "hit_rate": 0.75,
    }
    assert len(stack.planner.requests) == 2


def test_the_plan_s_functions_are_woken(stack: Stack, http: httpx.Client) -> None:
    receipt_of(http.post("/v1/chat/completions", json=CHAT))
    stack.planner.woken.wait()


def test_the_planner_learns_what_happened(stack: Stack, http: httpx.Client) -> None:
    stack.main.say("one two")
    body = {"model": MODEL, "prompt": "learn from this", "n": 2}
    receipt = receipt_of(http.post("/v1/completions", json=body))
    prompt, tokens = stack.encode("learn from this"), len(stack.encode("one two"))
    first, second = stack.planner.wait_for_observations(2, prompt)
    assert {first.plan_id, second.plan_id} == {"plan-1"}
    assert first.prefill_counts == [[len(prompt), 0]]
    assert first.decode_counts == [[0, tokens]]
    assert first.model_digest == "sha256:tiny"
    assert first.cost_usd + second.cost_usd == pytest.approx(receipt["cost_usd"])


def test_only_a_main_function_at_zero_waits_for_the_plan(
    stack: Stack, serve_gateway: Callable[..., str]
) -> None:
    url = serve_gateway()
    prompt = {"model": MODEL, "prompt": "which comes first", "stream": True}
    cold = httpx.post(f"{url}/v1/completions", json=prompt)
    assert '"plan_id":"plan-1"' in cold.text
    assert stack.main.requests[0].plan_id == "plan-1"
    stack.planner.answer_gate = Gate()
    with httpx.stream("POST", f"{url}/v1/completions", json=prompt, timeout=20) as warm:
        lines = (line for line in warm.iter_lines() if line.startswith("data: "))
        assert '"finish_reason":null' in next(lines)  # however much of the text has come
        stack.planner.answer_gate.open()
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert '"plan_id":"plan-2"' in last
    assert stack.main.requests[1].plan_id is None


def test_a_main_function_that_streams_is_known_to_run(
    stack: Stack, serve_gateway: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago it began to answer."""
    monkeypatch.setattr("gateway.main_client._WARM_FOR_S", 0.0)
    url = serve_gateway()
    going_on, words = Gate(), stack.encode("one two")

    async def say_slowly(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=words[:1])
        await going_on.passed()
        yield GenerateEvent(tokens=words[1:])
        yield GenerateEvent(finish="stop", stats=stats(request, len(words)))

    stack.main.script = say_slowly
    prompt = {"model": MODEL, "prompt": "which comes first", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=prompt, timeout=20) as first:
        running = first.iter_lines()
        assert "data: " in next(running)
        stack.main.say("one two")
        stack.planner.answer_gate = Gate()
        with httpx.stream("POST", f"{url}/v1/completions", json=prompt, timeout=20) as second:
            lines = (line for line in second.iter_lines() if line.startswith("data: "))
            assert '"finish_reason":null' in next(lines)
            stack.planner.answer_gate.open()
            *_, last, _done = lines
        going_on.open()
    assert '"plan_id":"plan-2"' in last
    assert stack.main.requests[1].plan_id is None


@pytest.mark.parametrize("trouble", ["late", "refusing", "gone"])
def test_a_request_goes_on_without_a_planner(
    stack: Stack, serve_gateway: Callable[..., str], trouble: str
) -> None:
    planner_url = None
    if trouble == "late":
        stack.planner.answer_gate = Gate()
    elif trouble == "refusing":
        stack.planner.refuses = True
    else:
        planner_url = "http://127.0.0.1:9"
    url = serve_gateway(plan_timeout_s=0.2, planner_url=planner_url)
    receipt = receipt_of(httpx.post(f"{url}/v1/chat/completions", json=CHAT))
    assert (receipt["plan"], receipt["plan_id"]) == ("degraded", None)
    assert receipt["predicted"] == dict.fromkeys(["ttft_ms", "tpot_ms", "cost_usd", "hit_rate"])
    assert receipt["cost_usd"]
    assert stack.main.requests[0].plan_id is None
    if stack.planner.answer_gate is not None:
        stack.planner.answer_gate.open()


def test_a_main_function_that_does_not_say_counts_as_warm(stack: Stack, http: httpx.Client) -> None:
    stack.main.ready_for_ms = None
    receipt = receipt_of(http.post("/v1/chat/completions", json=CHAT))
    assert receipt["cold_start"] == {
        "main_ms": 0.0,
        "activation_ms": 0.0,
        "boot_ms": 0.0,
        "load_ms": 0.0,
        "experts_ms": 125.0,
    }


def test_no_stats_no_cost(stack: Stack, http: httpx.Client) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"), finish="stop")

    stack.main.script = script
    receipt = receipt_of(http.post("/v1/chat/completions", json=CHAT))
    assert (receipt["cost_usd"], receipt["cost"], receipt["main_gb_s"]) == (None, None, None)


def test_time_per_token_weighs_every_token_alike() -> None:
    short = ChoiceRecord(tokens=2, first_token_at=1.0, last_token_at=2.0)
    long = ChoiceRecord(tokens=10, first_token_at=1.0, last_token_at=2.0)
    single = ChoiceRecord(tokens=1, first_token_at=0.5, last_token_at=0.5)
    receipt = build_receipt(
        received_at=0.25,
        asked_at=0.3,
        now=3.0,
        plans=[None],
        samples=3,
        records=[short, long, single],
        prices=DEFAULT_PRICES,
    )
    assert receipt.tpot_ms == 200.0
    assert receipt.ttft_ms == 250.0


@pytest.mark.parametrize(("gpu_gb_s", "share"), [(0.0, 0.0), (1.0, 0.25), (3.0, 0.5)])
def test_resident_memory_of_the_main_function_is_priced_by_where_it_is(
    gpu_gb_s: float, share: float
) -> None:
    usage = Usage.of(Ledger(main_gpu_gb_s=gpu_gb_s, main_cpu_gb_s=3.0))
    held = ResidentShare(main_gb_s=8.0, experts_gb_s=1.0, services_gb_s=1.0, starting_gb_s=0.0)
    gpu, cpu = DEFAULT_PRICES.gpu_usd_per_gb_s, DEFAULT_PRICES.cpu_usd_per_gb_s
    assert gpu is not None
    expected = 8 * share * gpu + (8 * (1 - share) + 2) * cpu
    assert _resident(held, usage, DEFAULT_PRICES).cost_usd == pytest.approx(expected, abs=2e-9)
    free = msgspec.structs.replace(DEFAULT_PRICES, gpu_usd_per_gb_s=None)
    assert (_resident(held, usage, free).cost_usd is None) == (share > 0)
