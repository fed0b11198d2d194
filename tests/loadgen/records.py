"""Records and runs made by hand, for what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

from loadgen.config import LoadConfig
from loadgen.measures import summarize
from loadgen.platform import FunctionSample, PlatformSample
from loadgen.receipt import ColdStart, Predicted, Receipt
from loadgen.record import RequestRecord
from loadgen.results import RunResult, TargetFacts
from loadgen.slo import Objective
from remoe.activation_totals import ActivationTotals

__all__ = ["platform_samples", "receipt", "record", "result"]


def record(index: int = 0, **changes: object) -> RequestRecord:
    """Sent on time at `index` seconds; TTFT 0.5 s, then 4 chunks 0.1 s apart; E2E 1 s."""
    values: dict[str, object] = {
        "asked_prompt_tokens": 100,
        "asked_output_tokens": 5,
        "intended_s": float(index),
        "sent_s": float(index),
        "first_token_s": index + 0.5,
        "last_s": index + 1.0,
        "itl_s": [0.1] * 4,
        "chunks": 5,
        "prompt_tokens": 110,
        "output_tokens": 5,
        "status": "completed",
    }
    return RequestRecord(index=index, **(values | changes))  # type: ignore[arg-type]


def receipt(**changes: object) -> Receipt:
    values: dict[str, object] = {
        "plan": "planned",
        "deployment_plan_id": "plan-1",
        "cold_start_ms": 250.0,
        "cold_start": ColdStart(main_ms=0.0, experts_ms=250.0),
        "remote_calls": 10,
        "remote_bytes": 1000,
        "main_gb_s": 2.0,
        "remote_gb_s": 0.5,
        "cost_usd": 1e-4,
        "price_book": "test-prices",
        "hit_rate": 0.6,
        "predicted": Predicted(cost_usd=2e-4, hit_rate=0.7),
    }
    return Receipt(**(values | changes))  # type: ignore[arg-type]


def platform_samples(seconds: int = 4) -> list[PlatformSample]:
    """Two functions of 1 GB: one always there and busy every other second, one from 2 s on."""
    return [
        PlatformSample(
            at_s=float(at),
            functions=[
                FunctionSample(
                    name="main",
                    ready=1,
                    starting=0,
                    gb=1.0,
                    busy_gb=float(at % 2),
                    cold_starts=1,
                    cold_start_total_ms=900.0,
                ),
                FunctionSample(
                    name="experts-l00-l04",
                    ready=int(at > 2),
                    starting=int(at == 2),
                    gb=1.0 if at >= 2 else 0.0,
                    busy_gb=0.0,
                    cold_starts=int(at > 2),
                    cold_start_total_ms=300.0 if at > 2 else 0.0,
                ),
            ],
        )
        for at in range(seconds + 1)
    ]


def result(
    records: Sequence[RequestRecord],
    *,
    name: str = "run",
    slo: Sequence[str] = (),
    samples: Sequence[PlatformSample] = (),
    activations: ActivationTotals | None = None,
) -> RunResult:
    span_s = max((r.intended_s or 0.0 for r in records), default=0.0)
    target = TargetFacts(
        url="http://target/v1",
        model="tiny",
        endpoint="chat",
        zero_unix_s=1.7e9,
        remoe_version="0",
        git_sha=None,
        host="here",
        trace="none",
        corpus="words",
        counted="by hand",
        ignore_eos=True,
        planned=len(records),
        span_s=span_s,
        cut=0,
        activations=activations,
    )
    summary = summarize(
        records,
        objectives=[Objective.parse(text) for text in slo],
        samples=samples,
        planned=len(records),
        span_s=span_s,
    )
    return RunResult(name, LoadConfig(slo=list(slo)), target, list(records), list(samples), summary)
