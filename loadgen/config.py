"""What a run is told to do, whole: `config.json` of a run repeats it."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Arrivals", "LoadConfig"]

Arrivals = Literal["trace", "poisson", "gamma", "constant", "closed"]


class LoadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds. `trace` None is the one that ships. No secret is in here.

    arrivals: `trace` replays the trace's own; the others take their lengths from it.
    stages: the rate profile of poisson, gamma and constant arrivals (see RateProfile.parse).
    requests, duration_s: whichever is reached first ends a closed loop; stages end by themselves.
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    endpoint: Literal["chat", "completions"] = "chat"
    trace: str | None = None
    trace_format: str | None = None
    lengths: str | None = None
    corpus: str | None = None
    tokenizer: str | None = None
    characters_per_token: float | None = None
    arrivals: Arrivals = "trace"
    stages: str | None = None
    burstiness: float = 1.0
    concurrency: int = 1
    duration_s: float | None = None
    requests: int | None = None
    start_s: float = 0.0
    end_s: float | None = None
    sample: float = 1.0
    speedup: float = 1.0
    seed: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    warm_up: int = 0
    settle_s: float = 0.0
    probe: bool = True
    ready_timeout_s: float = 60.0
    timeout_s: float = 600.0
    drain_s: float = 120.0
    max_in_flight: int = 4096
    max_errors: int | None = None
    max_error_share: float = 0.5
    slo: list[str] = []
    usd_per_hour: float | None = None
    detailed: bool = False
