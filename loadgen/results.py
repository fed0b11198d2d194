"""A run's folder: what is in it, and reading it back, also after a run that was killed.

config.json     what was asked for                         written first
target.json     what was found at the target               before the first request
requests.jsonl  a record a request                         as each ends
platform.jsonl  a sample of the platform a second          as taken
run.json        every figure                               at the end
summary.csv     the same figures, one a line               at the end
report.html     everything as pictures, self-contained     at the end
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from loadgen.config import LoadConfig
from loadgen.measures import Summary, summarize
from loadgen.platform import PlatformSample, read_samples
from loadgen.record import RequestRecord, read_records
from loadgen.slo import Objective
from loadgen.statistics import METHOD, Distribution
from remoe.activation_totals import ActivationTotals
from remoe.errors import SettingsError

__all__ = ["SCHEMA_VERSION", "RunFolder", "RunResult", "TargetFacts", "run_document"]

_Read = TypeVar("_Read")

SCHEMA_VERSION = 1


class TargetFacts(msgspec.Struct, kw_only=True):
    """Where and when, with what, and what is to be known about the numbers.

    zero_unix_s: the wall clock at the run's zero. counted: how prompts were cut to length.
    planned: how many requests; None where time is the limit.
    stopped: why the run ended early; None if it did not.
    """

    url: str
    model: str
    endpoint: str
    zero_unix_s: float
    remoe_version: str
    git_sha: str | None
    host: str
    trace: str
    corpus: str
    counted: str
    ignore_eos: bool
    planned: int | None
    span_s: float
    cut: int
    notes: list[str] = []
    stopped: str | None = None
    activations: ActivationTotals | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything of one run, as measured and as summarized."""

    name: str
    config: LoadConfig
    target: TargetFacts
    records: list[RequestRecord]
    samples: list[PlatformSample]
    summary: Summary


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's files; see the module."""

    path: Path

    @property
    def requests(self) -> Path:
        return self.path / "requests.jsonl"

    @property
    def platform(self) -> Path:
        return self.path / "platform.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def begin(self, config: LoadConfig) -> None:
        """Make the folder; raises SettingsError if it already holds a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "config.json").exists():
            raise SettingsError(f"{self.path} already holds a run; choose another --out")
        self._write("config.json", config)

    def note_target(self, target: TargetFacts) -> None:
        self._write("target.json", target)

    def load(self) -> RunResult:
        """Read the folder and summarize it anew; needs no run.json, so a killed run has one too.

        Raises SettingsError if it is no run's folder.
        """
        config = self._read("config.json", LoadConfig)
        target = self._read("target.json", TargetFacts)
        records = list(read_records(self.requests)) if self.requests.exists() else []
        samples = read_samples(self.platform)
        summary = summarize(
            records,
            objectives=[Objective.parse(text) for text in config.slo],
            samples=samples,
            usd_per_hour=config.usd_per_hour,
            planned=target.planned,
            span_s=target.span_s,
        )
        return RunResult(self.path.name, config, target, records, samples, summary)

    def finish(self, result: RunResult) -> None:
        """Write run.json and summary.csv."""
        self._write("run.json", run_document(result))
        with (self.path / "summary.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["figure", "value"])
            rows.writerows(_flat("", msgspec.to_builtins(result.summary)))

    def _write(self, name: str, value: object) -> None:
        path = self.path / name
        beside = path.with_suffix(".part")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        beside.replace(path)

    def _read(self, name: str, kind: type[_Read]) -> _Read:
        path = self.path / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError as error:
            raise SettingsError(
                f"{self.path} has no {name}: it is not the folder of a run, or the run ended before "
                "its first request"
            ) from error
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path}: {error}") from error


def run_document(result: RunResult) -> dict[str, object]:
    """`run.json`: our blocks, and vLLM's keys (`vllm bench serve`) beside them at the top."""
    document: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "config": result.config,
        "target": result.target,
        "percentiles": METHOD,
        "summary": result.summary,
        **_vllm_keys(result),
    }
    if result.config.detailed:
        document |= _vllm_arrays(result)
    return document


def _vllm_keys(result: RunResult) -> dict[str, object]:
    summary, config, target = result.summary, result.config, result.target
    requests, tokens = summary.requests, summary.tokens
    keys: dict[str, object] = {
        "model_id": target.model,
        "endpoint_type": f"openai-{target.endpoint}",
        "num_prompts": requests.planned,
        "request_rate": requests.offered_rps if requests.offered_rps is not None else "inf",
        "burstiness": config.burstiness,
        "max_concurrency": config.concurrency if config.arrivals == "closed" else None,
        "duration": summary.duration_s,
        "completed": requests.completed,
        "failed": requests.failed + requests.incomplete + requests.cancelled + requests.skipped,
        "total_input_tokens": tokens.prompt,
        "total_output_tokens": tokens.output,
        "request_throughput": requests.throughput_rps,
        "request_goodput": summary.goodput_rps,
        "output_throughput": tokens.output_per_s,
        "total_token_throughput": tokens.total_per_s,
        "max_output_tokens_per_s": tokens.most_output_per_s,
        "max_concurrent_requests": requests.most_in_flight,
    }
    for name, distribution in (
        ("ttft", summary.latency.ttft_ms),
        ("tpot", summary.latency.tpot_ms),
        ("itl", summary.latency.itl_ms),
        ("e2el", summary.latency.e2e_ms),
    ):
        keys |= _vllm_distribution(name, distribution)
    return keys


def _vllm_distribution(name: str, distribution: Distribution) -> dict[str, float | None]:
    return {
        f"mean_{name}_ms": distribution.mean,
        f"median_{name}_ms": distribution.p50,
        f"std_{name}_ms": distribution.std,
        f"p50_{name}_ms": distribution.p50,
        f"p90_{name}_ms": distribution.p90,
        f"p95_{name}_ms": distribution.p95,
        f"p99_{name}_ms": distribution.p99,
    }


def _vllm_arrays(result: RunResult) -> dict[str, list[object]]:
    """One entry a measured request, in the order of `index`; seconds."""
    records = sorted((r for r in result.records if not r.warm_up), key=lambda r: r.index)
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [record.itl_s for record in records],
        "latencies": [record.e2e_s for record in records],
        "start_times": [record.sent_s for record in records],
        "queue_times": [record.lag_s for record in records],
        "errors": [record.error or "" for record in records],
    }


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, inner)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _flat(f"{prefix}.{position}", inner)
    else:
        yield prefix, value
