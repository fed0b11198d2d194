"""What a request costs: CPU, GPU, Fetch, MIX and Remoe (A.13, A.14).

The default model is measured end to end on the local platform, by its receipts. Published models'
shapes are priced by the cost model that plans are made with, from a host's measured figures; swept
are the price of the GPU, the mix of reading and writing, the SLO, and the cost of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from evaluation.cost_model import Case, Outcome, Skew, concentration_of, cost_of_requests
from evaluation.hosts import DEFAULT_HOST, Host, load_host
from evaluation.platform import Deployed, LoadFigures, figures_of, load, platform
from evaluation.prompts import KnownPrompts, known_prompts
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.shapes import SHAPES, Shape
from evaluation.workbench import Workbench
from loadgen.config import LoadConfig
from loadgen.corpus import DEFAULT_CORPUS, read_corpus
from loadgen.plots.style import COLOURS, GREY, figure, label, legend, logarithmic
from loadgen.readers.own import write_own_trace
from loadgen.trace import TracedRequest
from remoe.prices import DEFAULT_PRICES

__all__ = ["make"]

_SHAPES = ("OLMoE-1B-7B", "DeepSeek-V2-Lite", "Mixtral-8x7B")
_CHARACTERS = 500
_HEED = 0.7
_RATIOS = (1.8, 3.0, 5.0, 10.0)
_SLOS = (0.6, 0.8, 1.0, 1.2, 2.0)
_CALLS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_DECODED = (10, 50, 100, 200, 400, 800)
_GPU_OVERHEADS_US = (5, 15, 50, 150, 300)


def make(bench: Workbench) -> TableResult:
    host = load_host(bench.options.host or DEFAULT_HOST)
    known = known_prompts(bench)
    skew = Skew(
        concentration_of(
            np.stack([entry.decode for entry in known.held_out])[:, list(known.model.moe_layers)]
        ),
        _HEED,
    )
    modelled = _modelled(bench, host, skew)
    sweeps = _sweeps(bench, host, skew)
    measured = _measured(bench, known)
    return TableResult(
        comparisons=[*_of_modelled(modelled), *_of_sweeps(sweeps), *_of_measured(measured)],
        series=[modelled, sweeps, measured],
        pictures=[_picture(modelled, sweeps), _measured_picture(measured)],
        notes=[
            f"Modelled on {host.name}. Measured: {'; '.join(host.measured)}.",
            f"Assumed: {'; '.join(host.assumed)}.",
            (
                f"Routes: {skew.concentration:.2f} of concentration an expert, as the default model's "
                f"decoding has; predictions know {skew.heed:.0%} of a request's shares."
            ),
            (
                f"Prices: {DEFAULT_PRICES.name}'s memory, the GPU's at a ratio to it; a request pays for "
                "the GPU memory it holds, and has all of the GPU's speed for it."
            ),
            (
                "The paper's ledger bills memory for busy time; the resident one all memory that is held "
                "while the request runs, idle functions included."
            ),
        ],
    )


# Published shapes, modelled


def _mean(outcomes: list[Outcome], shape: str) -> Iterator[list[Cell]]:
    for name in outcomes[0].ways:
        ways = [one.ways[name] for one in outcomes]
        yield [
            shape,
            name,
            float(np.mean([1e3 * way.ttft_s for way in ways])),
            float(np.mean([1e3 * way.tpot_s for way in ways])),
            float(np.mean([way.usd for way in ways])),
            float(np.mean([way.resident_usd for way in ways])),
            float(np.mean([way.meets_slo for way in ways])),
        ]


def _priced(
    bench: Workbench, host: Host, shape: Shape, case: Case, *, skew: Skew, requests: int
) -> list[Outcome]:
    return bench.item(
        f"{shape.name} modelled",
        {"host": host, "shape": shape, "case": repr(case), "skew": repr(skew), "n": requests},
        lambda: cost_of_requests(host, shape, case, skew, requests=requests),
        list[Outcome],
    )


def _modelled(bench: Workbench, host: Host, skew: Skew) -> Series:
    requests = 3 if bench.options.quick else 50
    rows: list[list[Cell]] = []
    for name in _SHAPES:
        rows += _mean(
            _priced(bench, host, SHAPES[name], Case(), skew=skew, requests=requests), name
        )
    return Series(
        name="modelled",
        columns=["model", "way", "ttft_ms", "tpot_ms", "usd", "resident_usd", "within_slo"],
        rows=rows,
    )


def _cases(quick: bool) -> Iterator[tuple[str, float, Case, float | None]]:
    """Sweep, value, case, and the GPU's launch of an expert in seconds where that is swept."""
    step = 3 if quick else 1
    for ratio in _RATIOS[::step]:
        yield "GPU price over CPU price", ratio, Case(gpu_price_ratio=ratio), None
    for slo in _SLOS[::step]:
        yield "SLO over MIX's latency", slo, Case(slo=slo), None
    for call_ms in _CALLS_MS[::step]:
        yield "a call's overhead, ms", call_ms, Case(invocation_s=call_ms / 1e3), None
    for decoded in _DECODED[::step]:
        yield "tokens written for 125 read", decoded, Case(decode_tokens=decoded), None
    for launch_us in _GPU_OVERHEADS_US[::step]:
        yield "GPU's launch of an expert, us", launch_us, Case(), launch_us / 1e6


def _sweeps(bench: Workbench, host: Host, skew: Skew) -> Series:
    requests = 1 if bench.options.quick else 5
    shapes = _SHAPES[:1] if bench.options.quick else _SHAPES
    rows: list[list[Cell]] = []
    for name in shapes:
        for sweep, value, case, launch_s in _cases(bench.options.quick):
            at = host
            if launch_s is not None:
                at = msgspec.structs.replace(host, gpu_expert_overhead_s=launch_s)
            outcomes = _priced(bench, at, SHAPES[name], case, skew=skew, requests=requests)
            ways = {
                way: np.mean([one.ways[way].usd for one in outcomes]) for way in outcomes[0].ways
            }
            remoe = float(ways["Remoe"])
            rows.append(
                [
                    name,
                    sweep,
                    value,
                    *(float(1 - remoe / ways[way]) for way in ("MIX", "CPU", "GPU", "Fetch")),
                    float(np.mean([one.saving for one in outcomes])),
                    outcomes[0].best_baseline,
                    float(np.mean([one.remote_share for one in outcomes])),
                    float(np.mean([one.ways["Remoe"].meets_slo for one in outcomes])),
                ]
            )
    return Series(
        name="sweeps",
        columns=[
            "model",
            "sweep",
            "value",
            *(f"saving_against_{way}" for way in ("MIX", "CPU", "GPU", "Fetch")),
            "saving_against_best",
            "best",
            "remote_share",
            "within_slo",
        ],
        rows=rows,
    )


# The default model, measured


def _measured(bench: Workbench, known: KnownPrompts) -> Series:
    quick = bench.options.quick
    requests, tokens = (3, 16) if quick else (bench.options.requests, 200)
    ways = [
        Deployed(name="Remoe, half of the experts remote", remote_ratio=0.5),
        Deployed(name="MIX: every expert resident", remote_ratio=0.0),
        Deployed(name="every expert remote", remote_ratio=1.0),
    ]
    if bench.options.hardware is not None:
        ways.insert(0, Deployed(name="Remoe, planned", planned=True))
    trace = _requests(bench, requests)
    rows: list[list[Cell]] = []
    for way in ways[:2] if quick else ways:

        def measure(of: Deployed = way) -> LoadFigures:
            with platform(bench, of) as running:
                config = LoadConfig(
                    trace=str(trace),
                    arrivals="closed",
                    requests=requests,
                    output_tokens=tokens,
                    warm_up=1,
                )
                return figures_of(load(bench, running, config, of.name.split(",")[0]))

        figures = bench.item(
            way.name,
            {
                "model": known.identity.model_digest,
                "way": repr(way),
                "requests": requests,
                "tokens": tokens,
                "hardware": str(bench.options.hardware) if way.planned else None,
            },
            measure,
            LoadFigures,
        )
        rows.append(
            [
                way.name,
                figures.completed,
                figures.ttft_ms.p50,
                figures.tpot_ms.p50,
                figures.usd,
                figures.resident_usd,
                figures.hit_rate,
                figures.remote_calls_per_token,
                figures.main_gb_s,
                figures.remote_gb_s,
            ]
        )
    return Series(
        name="measured",
        columns=[
            "way",
            "requests",
            "ttft_p50_ms",
            "tpot_p50_ms",
            "usd",
            "resident_usd",
            "hit_rate",
            "calls_a_token",
            "main_gb_s",
            "remote_gb_s",
        ],
        rows=rows,
    )


def _requests(bench: Workbench, count: int) -> Path:
    """Prompts of 500 characters, one of each set or topic in turn."""
    texts: list[str]
    if bench.options.prompts is None:
        corpus = read_corpus(DEFAULT_CORPUS)
        texts = [
            text[start : start + _CHARACTERS]
            for start in range(0, 4 * _CHARACTERS, _CHARACTERS)
            for text in map(" ".join, corpus.topics.values())
        ]
    else:
        from main_model_fn.prompt_sets import read_prompts

        texts = [
            prompt.text[:_CHARACTERS]
            for prompt in read_prompts(bench.options.prompts, 40, held_out=True)
        ]
    long = [text for text in texts if len(text) == _CHARACTERS]
    chosen = np.random.default_rng(0).permutation(len(long))[:count]
    path = bench.folder / "requests.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_own_trace(
        path,
        [
            TracedRequest(arrival_s=0.0, prompt_tokens=None, output_tokens=None, prompt=long[row])
            for row in chosen
        ],
    )
    return path


# Against the paper


def _of_modelled(modelled: Series) -> list[Comparison]:
    found = []
    for name in _SHAPES:
        rows = {str(row["way"]): row for row in modelled.named() if row["model"] == name}
        usd = {way: float(row["usd"] or 0) for way, row in rows.items()}
        resident = {way: float(row["resident_usd"] or 0) for way, row in rows.items()}
        within = [way for way, row in rows.items() if float(row["within_slo"] or 0) >= 0.95]
        best = min((way for way in within if way != "Remoe"), key=lambda way: usd[way])
        found.append(
            Comparison(
                what=f"cost of a request, {name}, modelled",
                paper="up to 57 % lower (DeepSeek-V2-Lite; which baseline is not said)"
                if name == "DeepSeek-V2-Lite"
                else None,
                ours=f"{1 - usd['Remoe'] / usd['MIX']:.0%} below MIX, "
                f"{1 - usd['Remoe'] / usd['CPU']:.0%} below CPU; the cheapest within the SLO is "
                f"{best}, at {usd[best] / usd['Remoe']:.2f} of Remoe's cost",
                same_setting=False,
                gap="an H100 and 16 cores instead of an A100 and 56; our GPU baselines are not "
                "slowed by a framework (see the sweep of the GPU's launches), and pay for the "
                "memory they use of a card",
            )
        )
        found.append(
            Comparison(
                what=f"the same by memory held, {name}",
                paper=None,
                ours=f"Remoe {resident['Remoe'] / resident['MIX']:.1f} times MIX",
                same_setting=False,
                gap="the paper does not bill a function between its calls; a function for each "
                "layer, held for the whole request, is a lot of memory",
            )
        )
    return found


def _of_sweeps(sweeps: Series) -> list[Comparison]:
    rows = sweeps.named()
    against_mix = [row for row in rows if float(row["saving_against_MIX"] or 0) >= 0.57]
    holds = [row for row in rows if float(row["saving_against_best"] or 0) >= 0.57]
    cheaper = [row for row in rows if float(row["saving_against_best"] or 0) > 0]

    def where(of: list[dict[str, Cell]]) -> str:
        seen = dict.fromkeys(f"{row['model']} at {row['sweep']} {row['value']}" for row in of)
        return "; ".join(list(seen)[:4]) + (" ..." if len(seen) > 4 else "")

    return [
        Comparison(
            what="where 57 % below the cheapest baseline within the SLO is reached",
            paper="57 % (up to)",
            ours=f"{len(holds)} of {len(rows)} points{': ' + where(holds) if holds else ''}; cheaper "
            f"at all at {len(cheaper)}{': ' + where(cheaper) if cheaper else ''}",
            same_setting=False,
            gap="the cheapest baseline is an ideal one, Fetch: every expert it needs is on the GPU "
            "before it is asked for, and moving it costs nothing",
        ),
        Comparison(
            what="where 57 % below MIX is reached",
            paper=None,
            ours=f"{len(against_mix)} of {len(rows)} points"
            f"{': ' + where(against_mix) if against_mix else ''}",
            same_setting=False,
            gap="MIX holds every expert's memory for the whole request",
        ),
    ]


def _of_measured(measured: Series) -> list[Comparison]:
    rows = {str(row["way"]).split(":", maxsplit=1)[0]: row for row in measured.named()}
    mix = rows["MIX"]
    found = []
    for name, row in rows.items():
        if name == "MIX":
            continue
        usd, resident = (
            float(row[ledger] or 0) / float(mix[ledger] or np.nan)
            for ledger in ("usd", "resident_usd")
        )
        slower = float(row["tpot_p50_ms"] or 0) / float(mix["tpot_p50_ms"] or np.nan)
        found.append(
            Comparison(
                what=f"default model end to end, {name}, against MIX",
                paper="GPT2-moe: Remoe lowest overall, small differences",
                ours=f"{usd:.2f} of MIX's cost by the papers' ledger, {resident:.2f} by memory held; "
                f"TPOT {slower:.2f} of MIX's",
                same_setting=False,
                gap="no GPU, 2 cores shared by all functions, a small model: its dense part and the "
                "runtime, not its experts, are most of the memory",
            )
        )
    return found


def _picture(modelled: Series, sweeps: Series) -> Picture:
    drawn, axes = figure(2, 3, height=5.6, width=11)
    shapes = list(dict.fromkeys(str(name) for name in modelled.column("model")))
    ways = list(dict.fromkeys(str(name) for name in modelled.column("way")))
    places = np.arange(len(shapes))
    for index, way in enumerate(ways):
        values = [float(row["usd"] or 0) for row in modelled.named() if row["way"] == way]
        axes[0].bar(places + 0.16 * (index - 2), values, 0.16, label=way, color=COLOURS[index])
    axes[0].set_xticks(places, shapes, fontsize=7)
    logarithmic(axes[0], "y")
    label(axes[0], "", "USD a request", "Papers' ledger, modelled")
    legend(axes[0])
    names = list(dict.fromkeys(str(name) for name in sweeps.column("sweep")))
    for at, sweep in zip(axes[1:], names, strict=False):
        for colour, shape in zip(COLOURS, shapes, strict=False):
            rows = [
                row for row in sweeps.named() if row["sweep"] == sweep and row["model"] == shape
            ]
            if not rows:
                continue
            values = [float(row["value"] or 0) for row in rows]
            for against, style in (("MIX", "-"), ("GPU", ":")):
                at.plot(
                    values,
                    [100 * max(-2, float(row[f"saving_against_{against}"] or 0)) for row in rows],
                    style,
                    marker="o",
                    markersize=3,
                    color=colour,
                    label=f"{shape} against {against}",
                )
        at.axhline(57, color=GREY, linewidth=0.8)
        if sweep != "SLO over MIX's latency":
            logarithmic(at, "x")
        label(at, sweep, "% saved", None)
    handles, names = axes[1].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return Picture(
        "cost",
        "A request of 125 tokens read and 200 written, modelled on an H100 and 16 cores; savings "
        "against MIX (lines) and GPU (dotted), the grey line is the paper's 57 %.",
        drawn,
    )


def _measured_picture(measured: Series) -> Picture:
    drawn, axes = figure(1, 2, height=2.8)
    names = [str(name).replace(", ", ",\n").replace(": ", ":\n") for name in measured.column("way")]
    places = np.arange(len(names))
    for offset, ledger, colour in ((-0.2, "usd", COLOURS[0]), (0.2, "resident_usd", COLOURS[1])):
        title = "papers' ledger" if ledger == "usd" else "memory held"
        axes[0].bar(places + offset, 1e6 * measured.numbers(ledger), 0.4, color=colour, label=title)
    axes[0].set_xticks(places, names, fontsize=7)
    label(axes[0], "", "USD for a million requests", "Default model, measured")
    legend(axes[0])
    axes[1].bar(places, measured.numbers("tpot_p50_ms"), 0.5, color=COLOURS[2])
    axes[1].set_xticks(places, names, fontsize=7)
    label(axes[1], "", "TPOT p50, ms", None)
    return Picture("measured", "The default model on the local platform.", drawn)
