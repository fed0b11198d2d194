"""One admitted request at work: plan, pre-warm, and its choices side by side."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import structlog

from gateway.admission import Job
from gateway.choice import Choice
from gateway.main_client import MainClient
from gateway.planner_client import PlannerClient
from gateway.prewarm import Prewarmer
from gateway.receipt import ChoiceRecord, Receipt, build_receipt
from gateway.residency import ResidentMeter
from gateway.text import TextModel
from remoe.generation import GenerateRequest
from remoe.plan import Observation, Plan, PlanRequest
from remoe.prices import PriceBook

__all__ = ["ChoiceDelta", "Generation", "Services"]

_log = structlog.get_logger()
# Deltas of one request that wait for a slow client before its generation is held up.
_QUEUE_LIMIT = 256

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New text of one choice; `finish` on its last."""

    index: int
    text: str
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Services:
    """What a generation works with."""

    text: TextModel
    planner: PlannerClient
    prewarmer: Prewarmer
    main: MainClient
    prices: PriceBook
    resident: ResidentMeter


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception


class Generation(AbstractAsyncContextManager["Generation"]):
    """The deltas of all choices in order of arrival; leaving the block cancels what still runs."""

    def __init__(self, job: Job, services: Services, *, reply_id: str, received_at: float) -> None:
        self.job = job
        self.plans: list[Plan | None] = []
        self._services = services
        self._reply_id = reply_id
        self._received_at = received_at
        self._asked_at = received_at
        self._choices = [Choice(services.text.detokenizer(), job.stops) for _ in range(job.choices)]
        self._queue: asyncio.Queue[ChoiceDelta | _Failure] = asyncio.Queue(_QUEUE_LIMIT)
        self._unfinished = job.choices
        self._driver: asyncio.Task[None] | None = None
        self._stay = services.resident.enter()
        self._receipt: Receipt | None = None

    async def __aenter__(self) -> Self:
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stay.leave()
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)

    def finished(self) -> bool:
        """Whether `next` has returned the last delta of every choice."""
        return self._unfinished == 0

    @property
    def completion_tokens(self) -> int:
        return sum(choice.record.tokens for choice in self._choices)

    @property
    def first_plan(self) -> Plan | None:
        return self.plans[0] if self.plans else None

    @property
    def records(self) -> list[ChoiceRecord]:
        return [choice.record for choice in self._choices]

    async def next(self, timeout_s: float | None = None) -> list[ChoiceDelta]:
        """Wait for new text; an empty list means that the time passed without any.

        Raises the first error of any choice, after the deltas that came before it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                items = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty() and not isinstance(items[-1], _Failure):
            items.append(self._queue.get_nowait())
        deltas: list[ChoiceDelta] = []
        for item in items:
            if isinstance(item, _Failure):
                if deltas:
                    self._queue.put_nowait(item)
                    break
                raise item.error
            deltas.append(item)
            self._unfinished -= item.finish is not None
        return deltas

    def receipt(self) -> Receipt:
        """What was used up to now; the same from the first call after the end on."""
        if self._receipt is not None:
            return self._receipt
        if self.finished():
            self._stay.leave()
        receipt = build_receipt(
            received_at=self._received_at,
            asked_at=self._asked_at,
            now=time.perf_counter(),
            plans=self.plans,
            samples=self.job.samples,
            records=self.records,
            prices=self._services.prices,
            resident=self._stay.share(),
        )
        if self.finished():
            self._receipt = receipt
        return receipt

    def report(self) -> None:
        """Tell the planner what each planned choice really did."""
        for index, choice in enumerate(self._choices):
            plan = self.plans[index // self.job.samples]
            record = choice.record
            if plan is None or record.stats is None or record.first_token_at is None:
                continue
            self._services.planner.observe(
                Observation(
                    plan_id=plan.plan_id,
                    model_digest=plan.model_digest,
                    prompt_tokens=self.job.prompts[index // self.job.samples],
                    prefill_counts=record.stats.prefill_counts,
                    decode_counts=record.stats.decode_counts,
                    ttft_s=record.first_token_at - self._received_at,
                    cold_start_s=record.cold_start_s + record.stats.ledger.remote_cold_start_s,
                    tpot_s=record.tpot_s(),
                    cost_usd=record.stats.ledger.cost(self._services.prices).total_usd,
                    ledger=record.stats.ledger,
                )
            )

    async def _drive(self) -> None:
        try:
            self.plans = await asyncio.gather(
                *(
                    self._plan(prompt, limit)
                    for prompt, limit in zip(self.job.prompts, self.job.max_new_tokens, strict=True)
                )
            )
            structlog.contextvars.bind_contextvars(
                plan_id=self.plans[0].plan_id if self.plans[0] else None
            )
            names = {name for plan in self.plans if plan for name in plan.prewarm}
            self._services.prewarmer.wake(sorted(names))
            self._asked_at = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for index in range(self.job.choices):
                    group.create_task(self._generate(index))
        except* Exception as errors:  # noqa: BLE001  # raised where the deltas are read
            # What broke first is what the client is told; the others were cancelled for it.
            await self._queue.put(_Failure(_first(errors)))

    async def _plan(self, prompt: list[int], max_new_tokens: int) -> Plan | None:
        return await self._services.planner.plan(
            PlanRequest(model=self.job.model, prompt_tokens=prompt, max_new_tokens=max_new_tokens)
        )

    async def _generate(self, index: int) -> None:
        prompt, sample = divmod(index, self.job.samples)
        plan = self.plans[prompt]
        choice = self._choices[index]
        request = GenerateRequest(
            # The client's own id may come twice; this one must not.
            request_id=f"{self._reply_id}-{index}",
            plan_id=plan.plan_id if plan else None,
            prompt_tokens=self.job.prompts[prompt],
            max_new_tokens=self.job.max_new_tokens[prompt],
            stop_tokens=list(self.job.stop_tokens),
            sampling=self.job.sampling[sample],
            running_stats=bool(self.job.stops),
        )
        async with self._services.main.generate(request) as stream:
            choice.record.cold_start_s = stream.cold_start_s
            async with aclosing(stream.events()) as events:
                async for event in events:
                    text = choice.absorb(event, now=time.perf_counter())
                    if text or choice.finish:
                        await self._queue.put(ChoiceDelta(index, text, choice.finish))
                    if choice.finish:
                        return


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, Exception):
        raise error
    return error
