"""One admitted request at work: plan, pre-warm, and its choices side by side.

What comes is given to the client's side in the task that reads it: a queue between the two would
cost each chunk another turn of the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from gateway.admission import Job
from gateway.choice import Choice, Shown
from gateway.deadline import MissedDeadlineError
from gateway.line import Line
from gateway.main_client import (
    InterruptedGenerationError,
    LostMainFunctionError,
    MainClient,
)
from gateway.planner_client import PlannerClient
from gateway.prewarm import Prewarmer
from gateway.progress import Progress
from gateway.receipt import ChoiceRecord, Receipt, build_receipt
from gateway.replies import FinishReason
from gateway.residency import ResidentMeter
from gateway.text import TextModel
from gateway.timings import Timings
from remoe.generation import GenerateEvent, GenerateRequest, TokenLogprob
from remoe.plan import Observation, Plan, PlanRequest
from remoe.prices import PriceBook

__all__ = ["ChoiceDelta", "Generation", "Services"]

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice; `finish` on its last."""

    index: int
    shown: Shown
    finish: FinishReason | None


_Taker = Callable[[ChoiceDelta], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Services:
    """What a generation works with."""

    text: TextModel
    planner: PlannerClient
    prewarmer: Prewarmer
    main: MainClient
    prices: PriceBook
    resident: ResidentMeter
    line: Line
    timings: Timings
    joint: bool = False  # the planner chooses a policy for each prompt, and seeds loads with it


class Generation:
    """Runs a job and gives the deltas of all choices, in order of arrival, to `take`.

    While `take` waits for a slow client nothing more is read; what has come meanwhile is more text
    at a time. Choices call it side by side.
    """

    def __init__(self, job: Job, services: Services, *, reply_id: str, received_at: float) -> None:
        self.job = job
        self.plans: list[Plan | None] = [None] * len(job.prompts)
        self.progress = Progress(services.timings)
        self._services = services
        self._reply_id = reply_id
        self._received_at = received_at
        self._asked_at = received_at
        self._choices = [self._new_choice() for _ in range(job.choices)]
        # The first choice of each prompt goes ahead: the others find its prompt in the cache.
        self._ahead = [asyncio.Event() for _ in job.prompts]
        self._planned = asyncio.Event()
        self._prompt_scores: list[list[TokenLogprob | None]] = [[] for _ in job.prompts]
        self._unfinished = job.choices
        self._stay = services.resident.enter()
        self._receipt: Receipt | None = None

    def _new_choice(self) -> Choice:
        text, job = self._services.text, self.job
        return Choice(text.detokenizer(), job.stops, calls_tools=job.calls_tools)

    def leave(self) -> None:
        """The request is over, whether it was answered or not."""
        self._stay.leave()

    def finished(self) -> bool:
        """Whether the last delta of every choice was given, or is just being given."""
        return self._unfinished == 0

    @property
    def completion_tokens(self) -> int:
        return sum(choice.record.tokens for choice in self._choices)

    @property
    def first_plan(self) -> Plan | None:
        return self.plans[0]

    @property
    def records(self) -> list[ChoiceRecord]:
        return [choice.record for choice in self._choices]

    def best(self) -> list[int]:
        """The choices to answer with: of each prompt the `n` likeliest by token, if more ran."""
        samples, n = self.job.samples, self.job.n
        chosen = []
        for first in range(0, self.job.choices, samples):
            ranked = list(range(first, first + samples))
            if samples > n:
                ranked.sort(key=lambda index: -self._choices[index].mean_logprob)
            chosen += ranked[:n]
        return chosen

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
                    cold_start_s=record.cold_start.total_s
                    + record.stats.ledger.remote_cold_start_s,
                    tpot_s=record.tpot_s(),
                    cost_usd=record.stats.ledger.cost(self._services.prices).total_usd,
                    ledger=record.stats.ledger,
                )
            )

    async def run(self, take: _Taker) -> None:
        """Run everything; raises what broke first. Cancelling it cancels it all."""
        try:
            async with asyncio.timeout(self._left_s()):
                await self._run(take)
        except TimeoutError:
            raise MissedDeadlineError(self.job.timeout_s or 0.0) from None
        except ExceptionGroup as errors:
            error = _first_error(errors)
            left_s = self._left_s()
            if (
                isinstance(error, InterruptedGenerationError)
                and left_s is not None
                and left_s < 0.1
            ):
                # The main function looks at the same clock, and may see it strike first.
                raise MissedDeadlineError(self.job.timeout_s or 0.0) from None
            raise error from None

    def _left_s(self) -> float | None:
        if self.job.timeout_s is None:
            return None
        return self.job.timeout_s - (time.perf_counter() - self._received_at)

    async def _run(self, take: _Taker) -> None:
        """Plan, and generate every choice.

        A main function that starts takes the partition of the latest plan, so that must be made
        first. One that runs has its partition: the first token need not wait for the plan, but in
        joint mode, where the plan says what its experts are to be prepared for.
        """
        with self._services.line.place(self.job.choices):
            async with asyncio.TaskGroup() as group:
                if self._services.main.warm and not self._services.joint:
                    # Begins when this task first waits: the main function has then been asked.
                    group.create_task(self._make_plans())
                else:
                    await self._make_plans()
                self._asked_at = time.perf_counter()
                self.progress.enter("starting")
                for index in range(1, self.job.choices):
                    group.create_task(self._generate(index, take))
                await self._generate(0, take)

    async def _make_plans(self) -> None:
        plans = [
            self._plan(prompt, limit)
            for prompt, limit in zip(self.job.prompts, self.job.max_new_tokens, strict=True)
        ]
        # One by itself needs no task of its own.
        self.plans = [await plans[0]] if len(plans) == 1 else await asyncio.gather(*plans)
        names = {name for plan in self.plans if plan for name in plan.prewarm}
        self._services.prewarmer.wake(sorted(names))
        self._planned.set()

    async def _plan(self, prompt: list[int], max_new_tokens: int) -> Plan | None:
        services = self._services
        return await services.planner.plan(
            PlanRequest(
                model=self.job.model,
                prompt_tokens=prompt,
                max_new_tokens=max(1, max_new_tokens),
                streams=max(1, services.resident.requests) if services.joint else None,
            )
        )

    async def _generate(self, index: int, take: _Taker) -> None:
        """Generate a choice; again from its beginning if it is lost before any of it was shown."""
        prompt, sample = divmod(index, self.job.samples)
        if sample:
            await self._ahead[prompt].wait()
        try:
            await self._attempt(index, prompt, sample, take)
        except LostMainFunctionError:
            if self._choices[index].shown:
                raise
            _log.info("asking the main function's successor", reply_id=self._reply_id, choice=index)
            self._choices[index] = self._new_choice()
            await self._attempt(index, prompt, sample, take)

    async def _attempt(self, index: int, prompt: int, sample: int, take: _Taker) -> None:
        choice = self._choices[index]
        services = self._services
        whole = Shown()
        async with services.main.generate(self._request(index, prompt, sample)) as stream:
            now = opened_at = time.perf_counter()
            choice.record.cold_start = stream.cold_start
            self.progress.enter("reading")
            begun = finished = False
            while not finished:
                events = await stream.read()
                now = time.perf_counter()
                if not begun and any(map(_tells, events)):
                    begun = True
                    self.progress.enter("answering")
                    services.timings.first_token(now - opened_at)
                    whole.extend(self._echo(choice, prompt, events))
                    self._ahead[prompt].set()
                whole.extend(choice.absorb(events, now=now))
                finished = choice.finish is not None
                last = finished and self._planned.is_set()
                # An answer sent whole leaves in one piece, and can begin anew until then.
                if whole and self.job.stream and not last:
                    choice.shown = True
                    await take(ChoiceDelta(index, whole, None))
                    whole = Shown()
            choice.shown = True
            services.timings.served(now - opened_at)
            await self._planned.wait()  # the receipt tells of it
            self._unfinished -= 1
            await take(ChoiceDelta(index, whole, choice.finish))

    def _request(self, index: int, prompt: int, sample: int) -> GenerateRequest:
        job = self.job
        plan = self.plans[prompt]
        limit = job.max_new_tokens[prompt]
        # Scores of a prompt are the same for each of its choices: the first one asks.
        scored = job.prompt_logprobs if sample == 0 or limit == 0 else None
        # Without forecasts of the policies joint mode seeds every prompt.
        seeded = plan is not None and self._services.joint and plan.policy in {None, "joint"}
        return GenerateRequest(
            # The client's own id may come twice; this one must not.
            request_id=f"{self._reply_id}-{index}",
            plan_id=plan.plan_id if plan else None,
            prompt_tokens=job.prompts[prompt],
            max_new_tokens=limit,
            stop_tokens=list(job.stop_tokens),
            sampling=job.sampling[sample],
            running_stats=bool(job.stops),
            logprobs=job.logprobs,
            prompt_logprobs=scored,
            deadline_s=self._left_s(),
            grammar=job.grammar,
            profile=plan.profile if plan and seeded else None,
            policy=plan.policy if plan else None,
        )

    def _echo(self, choice: Choice, prompt: int, events: Sequence[GenerateEvent]) -> Shown:
        if not self.job.echo:
            return Shown()
        for event in events:
            if event.prompt_logprobs:
                self._prompt_scores[prompt] = event.prompt_logprobs
        scores = self._prompt_scores[prompt] if self.job.logprobs is not None else []
        return choice.echo(
            self.job.echo[prompt],
            self.job.prompts[prompt],
            scores,
            self._services.text.detokenizer(),
        )


def _tells(event: GenerateEvent) -> bool:
    """Whether it is more than a report of what has been used."""
    return bool(event.tokens or event.prompt_logprobs or event.finish)


def _first_error(errors: BaseExceptionGroup[Exception]) -> Exception:
    """What broke first, of groups in groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, Exception):
        raise error
    return error
