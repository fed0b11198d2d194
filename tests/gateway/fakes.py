"""A main function and a planner that speak the wire protocol and keep what they were told.

They are the second implementation of the gateway's two upstream seams: real HTTP servers, with
tokens that a test decides.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from remoe.balance_report import BalanceReport
from remoe.experts import Partition
from remoe.generation import (
    GenerateEvent,
    GenerateRequest,
    GenerationStats,
    TokenLogprob,
    TopLogprob,
)
from remoe.ledger import Ledger
from remoe.lifecycle import READY_FOR_HEADER, START_HEADER
from remoe.moeless.function_balance import Policy
from remoe.plan import Neighbour, Observation, Plan, PlanRequest

__all__ = ["FakeMain", "FakePlanner", "Gate", "scored", "stats"]

Script = Callable[[GenerateRequest], AsyncIterator[GenerateEvent]]


class Gate:
    """Opened by the test, waited for inside a server; a closed gate fails after 10 s."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        assert self._event.wait(10), "nobody opened the gate"

    async def passed(self) -> None:
        await asyncio.to_thread(self.wait)


def stats(request: GenerateRequest, tokens: int) -> GenerationStats:
    """What the fake claims to have used: simple multiples of its tokens."""
    return GenerationStats(
        queue_s=0.25,
        first_token_s=0.5,
        total_s=1.0,
        prompt_tokens=len(request.prompt_tokens),
        output_tokens=tokens,
        deployment_plan_id="deployed-1",
        ledger=Ledger(
            main_gpu_gb_s=1.0,
            main_cpu_gb_s=2.0 * tokens,
            remote_gb_s=0.5,
            remote_calls=3,
            remote_bytes=1000,
            remote_cold_start_s=0.125,
            remote_retries=1,
            remote_hedges=2,
            local_fallbacks=2,
        ),
        prefill_counts=[[len(request.prompt_tokens), 0]],
        decode_counts=[[0, tokens]],
        balance=BalanceReport(
            policy="joint",
            layer_cv=[0.5],
            scaled_cv=[0.125],
            overlap=[0.75],
            replicas={"experts-0": 2},
            attached=3,
        ),
    )


def scored(token: int, alternatives: int) -> TokenLogprob:
    """A token's log-probability is minus its id in hundredths; the likeliest tokens are 0, 1..."""
    return TokenLogprob(
        token, -token / 100, [TopLogprob(other, -other / 100) for other in range(alternatives)]
    )


class FakeMain:
    """Echoes the prompt's tokens, one an event, unless told to say something else."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset()
        self.app = Starlette(
            routes=[Route("/v1/generate", self._generate, methods=["POST"])],
        )

    def reset(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.headers: list[dict[str, str]] = []
        self.script: Script = self._echo
        self.refusal: Response | None = None
        self.ready_for_ms: float | None = 1e9
        self.start_ms = "2000,3000"
        self.before_headers: Gate | None = None
        self.arrived = Gate()
        self.cancelled = Gate()

    def say(self, text: str, *, per_event: int = 1) -> None:
        """Answer every request with this text, some tokens an event."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.script = lambda request: self._send(request, tokens, per_event)

    async def _echo(self, request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        async for event in self._send(request, request.prompt_tokens, 1):
            yield event

    async def _send(
        self, request: GenerateRequest, tokens: list[int], per_event: int
    ) -> AsyncIterator[GenerateEvent]:
        wanted = tokens[: request.max_new_tokens]
        if request.prompt_logprobs is not None:
            alternatives = request.prompt_logprobs
            scores = [None, *(scored(t, alternatives) for t in request.prompt_tokens[1:])]
            yield GenerateEvent(prompt_logprobs=scores)
        for start in range(0, len(wanted), per_event):
            sent = wanted[start : start + per_event]
            so_far = stats(request, start + len(sent)) if request.running_stats else None
            logprobs = (
                [] if request.logprobs is None else [scored(t, request.logprobs) for t in sent]
            )
            yield GenerateEvent(tokens=sent, logprobs=logprobs, stats=so_far)
        yield GenerateEvent(
            finish="length" if len(tokens) > len(wanted) else "stop",
            stats=stats(request, len(wanted)),
        )

    async def _generate(self, request: Request) -> Response:
        generate = msgspec.json.decode(await request.body(), type=GenerateRequest)
        self.requests.append(generate)
        self.headers.append(dict(request.headers))
        self.arrived.open()
        if self.before_headers is not None:
            await self.before_headers.passed()
        if self.refusal is not None:
            return self.refusal
        headers = {START_HEADER: self.start_ms}
        if self.ready_for_ms is not None:
            headers[READY_FOR_HEADER] = str(self.ready_for_ms)
        return StreamingResponse(
            self._lines(generate), media_type="application/x-ndjson", headers=headers
        )

    async def _lines(self, request: GenerateRequest) -> AsyncIterator[bytes]:
        try:
            async for event in self.script(request):
                yield msgspec.json.encode(event) + b"\n"
        except asyncio.CancelledError:
            self.cancelled.open()
            raise


class FakePlanner:
    """Plans every request alike, and keeps what it is told."""

    def __init__(self) -> None:
        self.reset()
        self.app = Starlette(
            routes=[
                Route("/v1/plan", self._plan, methods=["POST"]),
                Route("/v1/observations", self._observe, methods=["POST"]),
                Route("/readyz", self._ready, methods=["GET"]),
            ]
        )

    def reset(self) -> None:
        self.requests: list[PlanRequest] = []
        self.headers: list[dict[str, str]] = []
        self.observations: list[Observation] = []
        self.observed = threading.Condition()
        self.woken = Gate()
        self.answer_gate: Gate | None = None
        self.policy: Policy | None = None
        self.refused_observations = 0
        self.refuses = False

    def wait_for_observations(self, count: int, prompt_tokens: list[int]) -> list[Observation]:
        """What was reported of one prompt; other tests' reports may still be arriving."""

        def reported() -> list[Observation]:
            return [o for o in self.observations if o.prompt_tokens == prompt_tokens]

        with self.observed:
            assert self.observed.wait_for(lambda: len(reported()) >= count, timeout=10)
            return reported()

    async def _plan(self, request: Request) -> Response:
        asked = msgspec.json.decode(await request.body(), type=PlanRequest)
        self.requests.append(asked)
        self.headers.append(dict(request.headers))
        if self.answer_gate is not None:
            await self.answer_gate.passed()
        if self.refuses:
            return PlainTextResponse("no history", status_code=500)
        plan = Plan(
            plan_id=f"plan-{len(self.requests)}",
            model=asked.model,
            model_digest="sha256:tiny",
            partition=Partition(experts=2, remote=((1,),)),
            profile=[[0.75, 0.25]],
            main_memory_gb=1.0,
            functions=[],
            # The planner's own /readyz plays the expert function that is to be woken.
            prewarm=["experts-0", "unknown-function"],
            neighbours=[Neighbour(history_id=7, topic="maths", similarity=0.9, weight=1.0)],
            predicted_ttft_s=0.5,
            predicted_tpot_s=0.0625,
            predicted_cost_usd=0.001,
            policy=self.policy,
        )
        return Response(msgspec.json.encode(plan), media_type="application/json")

    async def _observe(self, request: Request) -> Response:
        observation = msgspec.json.decode(await request.body(), type=Observation)
        if self.refused_observations:
            self.refused_observations -= 1
            return PlainTextResponse("the history is full", status_code=503)
        with self.observed:
            self.observations.append(observation)
            self.observed.notify_all()
        return Response(status_code=202)

    async def _ready(self, request: Request) -> Response:
        self.woken.open()
        return PlainTextResponse("ready")
