"""Azure's code and conversation hour, replayed faster on the local platform.

The same requests against three deployments of the default model: half of the experts remote,
everything resident (MIX), and every expert remote. TTFT, TPOT, goodput and both bills.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from evaluation.platform import Deployed, LoadFigures, figures_of, load, platform
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.workbench import Workbench
from loadgen.config import LoadConfig
from loadgen.plots.style import COLOURS, figure, label, legend
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError

__all__ = ["TWO_MINUTES", "make", "replayed"]

_TRACES = {
    "code": "AzureLLMInferenceTrace_code.csv",
    "conversation": "AzureLLMInferenceTrace_conv.csv",
}
_SLO = ("ttft<2s", "tpot<150ms")
_WAYS = (
    Deployed(name="Remoe, half of the experts remote", remote_ratio=0.5),
    Deployed(name="MIX: every expert resident", remote_ratio=0.0),
    Deployed(name="every expert remote", remote_ratio=1.0),
)
_LENGTHS = LoadConfig(max_prompt_tokens=128, max_output_tokens=32, warm_up=1, slo=list(_SLO))
# The hour in two minutes, and of its requests one in so many that two cores keep up: some 35.
_HOUR = msgspec.structs.replace(_LENGTHS, end_s=3600.0, speedup=30.0)
_SAMPLES = {"code": 0.0041, "conversation": 0.0019}
TWO_MINUTES = msgspec.structs.replace(
    _LENGTHS, end_s=1200.0, speedup=10.0, sample=0.01, max_output_tokens=16
)


def make(bench: Workbench) -> TableResult:
    runs = _runs(bench)
    return TableResult(
        comparisons=_compared(runs),
        series=[runs],
        pictures=[_picture(runs)],
        notes=[
            (
                "Requests are a seeded sample of the hour, many times as fast, and cut to what a "
                "small model on few cores answers; every deployment gets the same ones."
            ),
            f"Goodput: the share of requests with {' and '.join(_SLO)}.",
        ],
    )


def replayed(bench: Workbench) -> dict[str, tuple[str | None, LoadConfig]]:
    """The runs to make: a trace's file (None: the one that ships) and how it is replayed."""
    if bench.options.traces is None:
        # Two minutes made up: as they are.
        speedup = 2.0 if bench.options.quick else 1.0
        return {"the trace that ships": (None, msgspec.structs.replace(_LENGTHS, speedup=speedup))}
    found: dict[str, tuple[str | None, LoadConfig]] = {}
    for name, file in _TRACES.items():
        path = bench.options.traces / file
        if not path.exists():
            raise SettingsError(
                f"{bench.options.traces} has no {file}; Azure's traces are at "
                "https://github.com/Azure/AzurePublicDataset"
            )
        hour = msgspec.structs.replace(_HOUR, sample=_SAMPLES[name])
        found[name] = (str(path), TWO_MINUTES if bench.options.quick else hour)
    return dict(list(found.items())[:1]) if bench.options.quick else found


def _runs(bench: Workbench) -> Series:
    digest = Checkpoint.open(bench.options.model_dir).digest
    rows: list[list[Cell]] = []
    for trace, (path, config) in replayed(bench).items():
        for way in _WAYS[:2] if bench.options.quick else _WAYS:

            def measure(
                of: Deployed = way, at: str | None = path, by: LoadConfig = config, on: str = trace
            ) -> LoadFigures:
                with platform(bench, of) as running:
                    run = f"{on} {of.name.split(',', maxsplit=1)[0].split(':')[0]}"
                    return figures_of(load(bench, running, _of(by, at), run.replace(" ", "-")))

            figures = bench.item(
                f"{trace}, {way.name}",
                {
                    "model": digest,
                    "way": repr(way),
                    "trace": Path(path).name if path else None,
                    "config": config,
                },
                measure,
                LoadFigures,
            )
            rows.append([trace, way.name, *_row(figures)])
    return Series(name="runs", columns=["trace", "way", *_FIGURES], rows=rows)


def _of(config: LoadConfig, trace: str | None) -> LoadConfig:
    return msgspec.structs.replace(config, trace=trace)


_FIGURES = [
    "completed",
    "failed",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "goodput",
    "usd",
    "resident_usd",
    "usd_per_million_tokens",
    "held_gb_s",
    "idle_share",
    "hit_rate",
    "calls_a_token",
    "cold_starts",
]


def _row(figures: LoadFigures) -> list[Cell]:
    return [
        figures.completed,
        figures.failed,
        figures.ttft_ms.p50,
        figures.ttft_ms.p99,
        figures.tpot_ms.p50,
        figures.tpot_ms.p99,
        figures.goodput_share,
        figures.usd,
        figures.resident_usd,
        figures.usd_per_million_tokens,
        figures.held_gb_s,
        figures.idle_share,
        figures.hit_rate,
        figures.remote_calls_per_token,
        figures.cold_starts,
    ]


def _compared(runs: Series) -> list[Comparison]:
    found = []
    for trace in dict.fromkeys(str(name) for name in runs.column("trace")):
        rows = {
            str(row["way"]).split(":", maxsplit=1)[0]: row
            for row in runs.named()
            if row["trace"] == trace
        }
        mix = rows["MIX"]

        def against(row: dict[str, Cell], name: str, base: dict[str, Cell] = mix) -> float:
            return float(row[name] or np.nan) / float(base[name] or np.nan)

        for name, row in rows.items():
            if name == "MIX":
                continue
            found.append(
                Comparison(
                    what=f"{trace} replayed: {name}, against MIX",
                    paper=None,
                    ours=f"TTFT p50 {against(row, 'ttft_p50_ms'):.2f}, TPOT p50 "
                    f"{against(row, 'tpot_p50_ms'):.2f}, papers' ledger {against(row, 'usd'):.2f}, "
                    f"memory held {against(row, 'resident_usd'):.2f} of MIX's; goodput "
                    f"{float(row['goodput'] or 0):.0%} against {float(mix['goodput'] or 0):.0%}",
                    same_setting=False,
                    gap="the papers replay no trace against Remoe; batches form, and a resident "
                    "expert costs a batch no more than one request",
                )
            )
    return found


def _picture(runs: Series) -> Picture:
    traces = list(dict.fromkeys(str(name) for name in runs.column("trace")))
    ways = list(dict.fromkeys(str(name) for name in runs.column("way")))
    drawn, axes = figure(1, 4, height=3.0, width=11)
    places = np.arange(len(traces))
    for at, (name, unit) in zip(
        axes,
        (
            ("ttft_p50_ms", "TTFT p50, ms"),
            ("tpot_p50_ms", "TPOT p50, ms"),
            ("usd", "USD a request, papers' ledger"),
            ("resident_usd", "USD a request, memory held"),
        ),
        strict=True,
    ):
        for index, way in enumerate(ways):
            values = [
                next(
                    float(row[name] or 0)
                    for row in runs.named()
                    if row["way"] == way and row["trace"] == trace
                )
                for trace in traces
            ]
            at.bar(places + 0.27 * (index - 1), values, 0.27, color=COLOURS[index], label=way)
        at.set_xticks(places, traces, fontsize=7)
        label(at, "", unit)
    axes[0].set_ylim(top=1.4 * axes[0].get_ylim()[1])  # room for the legend
    legend(axes[0])
    return Picture("replay", "The same requests against three deployments.", drawn)
