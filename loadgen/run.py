"""One run from its configuration to its folder: probe, warm up, replay, summarize."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from loadgen.client import RequestShape, StreamingClient, open_session
from loadgen.clock import Clock, MonotonicClock
from loadgen.config import LoadConfig
from loadgen.corpus import DEFAULT_CORPUS, Corpus, read_corpus
from loadgen.platform import PlatformProbe, Sampler
from loadgen.prompts import CalibratedCutter, Cutter, PromptMaker, TokenizerCutter
from loadgen.record import RecordFile, RequestRecord
from loadgen.replay import Progress, Replay, ReplayLimits
from loadgen.results import RunFolder, RunResult, TargetFacts
from loadgen.schedule import build_workload
from loadgen.slo import Objective
from loadgen.target import calibrate, find_model, find_shape, probe_with
from loadgen.workload import PlannedRequest, Workload
from remoe import __version__
from remoe.activation_totals import ActivationTotals

__all__ = ["Load", "run_load"]

# Between the last preparation and the first request.
_LEAD_S = 0.2
_WARM_UP_CONCURRENCY = 4
_PREPARED_BYTES = 256_000_000


@dataclass(slots=True)
class Load:
    """A run's surroundings: what is not in its configuration.

    on_start is told the folder's facts, the live progress and how to stop before the first request.
    """

    api_key: str | None = None
    probe: PlatformProbe | None = None
    clock: Clock = field(default_factory=MonotonicClock)
    say: Callable[[str], None] = lambda _: None
    on_start: Callable[[TargetFacts, Progress, Callable[[str], None]], None] = (
        lambda _target, _progress, _stop: None
    )


async def run_load(config: LoadConfig, folder: RunFolder, load: Load) -> RunResult:
    """Run and write everything but the report; returns what the folder holds.

    Raises SettingsError before anything is written for what cannot be run, UnavailableError if the
    target does not answer.
    """
    for text in config.slo:
        Objective.parse(text)
    workload = build_workload(config)
    corpus = read_corpus(Path(config.corpus) if config.corpus else DEFAULT_CORPUS)
    async with AsyncExitStack() as cleanup:
        session = await cleanup.enter_async_context(open_session(api_key=load.api_key))
        shape, cutter, notes = await _meet_target(config, corpus, session, load)
        folder.begin(config)
        records = RecordFile(folder.requests)
        cleanup.callback(records.close)
        run = _Run(
            config=config,
            workload=workload,
            shape=shape,
            maker=PromptMaker(corpus, cutter, seed=config.seed),
            session=session,
            load=load,
            records=records,
        )
        if config.warm_up:
            load.say(f"Warming up with {config.warm_up} requests ...")
            await run.warm_up()
        if config.settle_s:
            load.say(f"Waiting {config.settle_s:g} s ...")
            await load.clock.sleep_until(load.clock.now() + config.settle_s)
        if config.arrivals != "closed":
            load.say("Making prompts ...")
            run.prepare()
        before = _activations(load.probe)
        zero = load.clock.now() + _LEAD_S
        facts = _facts(
            config=config,
            workload=workload,
            corpus=corpus,
            shape=shape,
            cutter=cutter,
            notes=notes,
        )
        folder.note_target(facts)
        sampler = None
        if load.probe is not None:
            sampler = Sampler(load.probe, folder.platform, clock=load.clock, zero=zero)
            await sampler.take()
            sampling = asyncio.create_task(sampler.run())
            cleanup.callback(sampling.cancel)
        facts.stopped = await run.measured(zero, facts)
        if sampler is not None:
            await sampler.take()
        after = _activations(load.probe)
        if before is not None and after is not None:
            facts.activations = after.since(before)
        folder.note_target(facts)
    result = folder.load()
    folder.finish(result)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Everything a replay needs, once the target is known."""

    config: LoadConfig
    workload: Workload
    shape: RequestShape
    maker: PromptMaker
    session: aiohttp.ClientSession
    load: Load
    records: RecordFile
    bodies: dict[int, tuple[bytes, str | None]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the prompts before the clock starts, as far as they fit into memory."""
        size_bytes = 0
        for request in self.workload.requests:
            body, _ = self.bodies[request.index] = self._make(request)
            size_bytes += len(body)
            if size_bytes > _PREPARED_BYTES:
                return

    async def warm_up(self) -> None:
        """Send requests like the run's first ones, kept apart from what is measured."""
        wanted = min(self.config.warm_up, len(self.workload.requests))
        replay = self._replay(self.load.clock.now(), wanted, warm_up=True)
        await replay.closed_loop(
            self.workload.requests[:wanted], concurrency=min(wanted, _WARM_UP_CONCURRENCY)
        )

    async def measured(self, zero: float, facts: TargetFacts) -> str | None:
        """Replay; returns why it stopped early, or None."""
        config, requests = self.config, self.workload.requests
        replay = self._replay(zero, facts.planned)
        self.load.on_start(facts, replay.progress, replay.stop)
        if config.arrivals == "closed":
            await self.load.clock.sleep_until(zero)
            await replay.closed_loop(
                requests, concurrency=config.concurrency, until_s=config.duration_s
            )
        else:
            await replay.open_loop(requests)
        return replay.progress.stopped

    def _replay(self, zero: float, planned: int | None, *, warm_up: bool = False) -> Replay:
        config = self.config
        client = StreamingClient(
            self.session, self.shape, self.load.clock, timeout_s=config.timeout_s, zero=zero
        )

        def done(record: RequestRecord) -> None:
            record.warm_up = warm_up
            self.records.write(record)

        return Replay(
            client,
            clock=self.load.clock,
            zero=zero,
            limits=ReplayLimits(
                max_in_flight=config.max_in_flight,
                drain_s=config.drain_s,
                max_errors=config.max_errors,
                max_error_share=config.max_error_share,
            ),
            body_of=self._body,
            on_done=done,
            planned=planned,
        )

    def _body(self, request: PlannedRequest, record: RequestRecord) -> bytes:
        ready = request.index in self.bodies
        made = self.bodies.pop(request.index) if ready else self._make(request)
        body, record.topic = made
        return body

    def _make(self, request: PlannedRequest) -> tuple[bytes, str | None]:
        prompt, topic = request.prompt, request.topic
        if prompt is None:
            prompt, topic = self.maker.make(request.index, request.prompt_tokens, topic)
        return self.shape.body(prompt, request.output_tokens), topic


async def _meet_target(
    config: LoadConfig, corpus: Corpus, session: aiohttp.ClientSession, load: Load
) -> tuple[RequestShape, Cutter, list[str]]:
    load.say(f"Looking for {config.url} ...")
    base_url = config.url.rstrip("/")
    model = await find_model(
        session, base_url, model=config.model, timeout_s=config.ready_timeout_s, clock=load.clock
    )
    shape = RequestShape(base_url, model, config.endpoint)
    probe = probe_with(session, load.clock, timeout_s=config.timeout_s)
    notes: list[str] = []
    if config.probe:
        load.say(f"Asking {model} what it takes ...")
        shape, notes = await find_shape(shape, probe)
    known = config.characters_per_token
    measured = CalibratedCutter(known or 4.0)
    if known is None and config.probe:
        text = PromptMaker(corpus, CalibratedCutter(1.0), seed=config.seed).make(0, 2400)[0]
        measured, more = await calibrate(shape, probe, text)
        notes += more
    elif known is None and config.tokenizer is None:
        notes.append("not probed: 4 characters are taken for one token")
    if config.tokenizer is not None:
        return shape, TokenizerCutter.load(Path(config.tokenizer), measured.overhead_tokens), notes
    return shape, measured, notes


def _facts(
    *,
    config: LoadConfig,
    workload: Workload,
    corpus: Corpus,
    shape: RequestShape,
    cutter: Cutter,
    notes: list[str],
) -> TargetFacts:
    counted = (
        f"by the server's own counts: {cutter.characters_per_token:.2f} characters a token, "
        f"{cutter.overhead_tokens:.0f} tokens of chat template"
        if isinstance(cutter, CalibratedCutter)
        else f"by {config.tokenizer}"
    )
    if workload.borrowed:
        lengths = Path(config.lengths).name if config.lengths else "the trace that ships"
        notes = [*notes, f"{workload.borrowed} requests took their lengths from {lengths}"]
    if workload.cut:
        notes = [*notes, f"{workload.cut} requests were cut to the given longest lengths"]
    return TargetFacts(
        url=shape.base_url,
        model=shape.model,
        endpoint=shape.endpoint,
        zero_unix_s=time.time() + _LEAD_S,
        remoe_version=__version__,
        git_sha=_git_sha(),
        host=f"{platform.machine()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}",
        trace=Path(config.trace).name if config.trace else "the one that ships (generated)",
        corpus=f"{corpus.name}: {len(corpus.topics)} topics, {corpus.characters:,} characters",
        counted=counted,
        ignore_eos=shape.ignore_eos,
        planned=None
        if config.arrivals == "closed" and config.requests is None and config.duration_s
        else len(workload.requests),
        span_s=workload.span_s,
        cut=workload.cut,
        notes=notes,
    )


def _activations(probe: PlatformProbe | None) -> ActivationTotals | None:
    return None if probe is None else probe.activations()


def _git_sha() -> str | None:
    """The commit of the checkout this runs from; None for an installed package."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
