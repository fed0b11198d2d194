"""From a configuration to the requests of a run: which arrivals, which lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, repeat
from pathlib import Path

import numpy as np

from loadgen.arrivals import CONSTANT, POISSON, arrival_times
from loadgen.config import LoadConfig
from loadgen.default_trace import DEFAULT_TRACE
from loadgen.rates import RateProfile
from loadgen.readers import read_trace
from loadgen.trace import ReadOptions, Selection, TracedRequest
from loadgen.workload import LengthLimits, Workload, with_lengths
from remoe.errors import SettingsError

__all__ = ["build_workload"]

_CLOSED_LOOP_REQUESTS = 100_000
_LENGTH_ROWS = 100_000


def build_workload(config: LoadConfig) -> Workload:
    """Plan every request of a run; the same configuration gives the same plan.

    Raises SettingsError or TraceError for what cannot be planned.
    """
    limits = LengthLimits(
        config.prompt_tokens,
        config.output_tokens,
        config.max_prompt_tokens,
        config.max_output_tokens,
    )
    # With arrivals of another kind the rows in the window give lengths, and texts if they have
    # them, but not the times.
    replayed = config.arrivals == "trace"
    rows = [] if replayed else list(islice(_selected(config), _LENGTH_ROWS))
    workload = with_lengths(_arrivals(config, rows), _lengths(config, rows), limits)
    if not workload.requests:
        raise SettingsError(
            "nothing would be sent: no request is in the window, or the sample took none. Widen "
            "--window, raise --sample, or look at the trace with `remoe load describe`."
        )
    return workload


def _arrivals(
    config: LoadConfig, rows: Sequence[TracedRequest]
) -> Iterable[tuple[float | None, int, TracedRequest | None]]:
    if config.arrivals == "trace":
        return ((request.arrival_s, 0, request) for request in _selected(config))
    told = [row for row in rows if row.prompt is not None]
    texts = cycle(told) if told else repeat(None)
    if config.arrivals == "closed":
        wanted = config.requests or (_CLOSED_LOOP_REQUESTS if config.duration_s else 100)
        return ((None, 0, text) for text in islice(texts, wanted))
    if config.stages is None:
        raise SettingsError(f"{config.arrivals} arrivals need --rate and --duration, or --stages")
    profile = RateProfile.parse(config.stages)
    burstiness = {"poisson": POISSON, "constant": CONSTANT}.get(config.arrivals, config.burstiness)
    random = np.random.default_rng([config.seed, 0xA1])
    times = arrival_times(profile, burstiness=burstiness, random=random)
    return (
        (at_s, profile.stage_at(at_s), text)
        for at_s, text in zip(islice(times, config.requests), texts, strict=False)
    )


def _lengths(config: LoadConfig, rows: list[TracedRequest]) -> list[TracedRequest]:
    """Rows to take lengths from, where an arrival has none; `rows` are the window's."""
    if config.prompt_tokens and config.output_tokens:
        return []
    if config.lengths is not None:
        return list(islice(read_trace(Path(config.lengths)), _LENGTH_ROWS))
    whole = any(row.prompt_tokens and row.output_tokens for row in rows)
    return rows if whole else list(read_trace(DEFAULT_TRACE))


def _selected(config: LoadConfig) -> Iterator[TracedRequest]:
    path = DEFAULT_TRACE if config.trace is None else Path(config.trace)
    options = ReadOptions(seed=config.seed, start_s=config.start_s)
    replayed = config.arrivals == "trace"
    selection = Selection(
        start_s=config.start_s,
        end_s=config.end_s,
        sample=config.sample,
        max_requests=config.requests if replayed else None,
        speedup=config.speedup if replayed else 1.0,
        seed=config.seed,
    )
    return selection.apply(read_trace(path, options, name=config.trace_format))
