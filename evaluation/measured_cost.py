"""What a request of the default model costs each way, measured end to end on the local platform (A.14).

The paper's requests: 500 characters read, 200 tokens written, one after another. They are sent in
rounds, each way in turn, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evaluation.platform import Deployed, LoadFigures, figures_of, load, platform
from evaluation.results import Cell, Comparison, Picture, Series
from evaluation.workbench import Workbench
from loadgen.config import LoadConfig
from loadgen.corpus import DEFAULT_CORPUS, read_corpus
from loadgen.plots.style import COLOURS, figure, label, legend
from loadgen.readers.own import write_own_trace
from loadgen.trace import TracedRequest
from remoe.checkpoint import Checkpoint

__all__ = ["measured_comparisons", "measured_cost", "measured_picture"]

_CHARACTERS = 500
_TOKENS, _QUICK_TOKENS = 200, 16
_ROUND, _QUICK_ROUND = 10, 3
_PLANNED = Deployed(name="Remoe, planned", planned=True)
_HALF = Deployed(name="Remoe, half of the experts remote", remote_ratio=0.5)
_MIX = Deployed(name="MIX: every expert resident", remote_ratio=0.0)
_ALL = Deployed(name="every expert remote", remote_ratio=1.0)


def measured_cost(bench: Workbench) -> Series:
    """A row a way; times and both bills are means of its requests.

    Every expert remote is a bound, not a way to serve: it is measured in the first round only.
    """
    quick = bench.options.quick
    count = _QUICK_ROUND if quick else bench.options.requests
    prompts = _prompts(bench, count)
    rounds = [prompts[at : at + _ROUND] for at in range(0, len(prompts), _ROUND)]
    ways = [_HALF, _MIX] if quick else [_HALF, _MIX, _ALL]
    if bench.options.hardware is not None:
        ways.insert(0, _PLANNED)
    found: dict[Deployed, list[LoadFigures]] = {way: [] for way in ways}
    for (number, texts), way in itertools.product(enumerate(rounds), ways):
        if number == 0 or way is not _ALL:
            found[way].append(_round(bench, way, number, texts))
    rows: list[list[Cell]] = [[way.name, *_means(figures)] for way, figures in found.items()]
    return Series(name="measured", columns=["way", *_COLUMNS], rows=rows)


def _round(bench: Workbench, way: Deployed, number: int, texts: Sequence[str]) -> LoadFigures:
    tokens = _QUICK_TOKENS if bench.options.quick else _TOKENS
    hardware = bench.options.hardware

    def measure() -> LoadFigures:
        trace = _write_requests(bench.folder / f"requests-{number}.jsonl", texts)
        config = LoadConfig(
            trace=str(trace),
            arrivals="closed",
            requests=len(texts),
            output_tokens=tokens,
            warm_up=1,
        )
        with platform(bench, way) as running:
            name = f"{way.name.split(',')[0].split(':')[0]}-{number}"
            return figures_of(load(bench, running, config, name.replace(" ", "-")))

    return bench.item(
        f"{way.name.replace(':', ',')}, round {number + 1}",
        {
            "model": Checkpoint.open(bench.options.model_dir).digest,
            "way": repr(way),
            "prompts": texts,
            "tokens": tokens,
            "hardware": hardware.name if way.planned and hardware else None,
        },
        measure,
        LoadFigures,
    )


def _prompts(bench: Workbench, count: int) -> list[str]:
    """So many of 500 characters, drawn from all sets or topics."""
    texts: Iterable[str]
    if bench.options.prompts is None:
        corpus = read_corpus(DEFAULT_CORPUS)
        texts = [
            text[start : start + _CHARACTERS]
            for start in range(0, 4 * _CHARACTERS, _CHARACTERS)
            for text in map(" ".join, corpus.topics.values())
        ]
    else:
        from main_model_fn.prompt_sets import read_prompts

        held_out = read_prompts(bench.options.prompts, 40, held_out=True)
        texts = [prompt.text[:_CHARACTERS] for prompt in held_out]
    long = [text for text in texts if len(text) == _CHARACTERS]
    return [long[row] for row in np.random.default_rng(0).permutation(len(long))[:count]]


def _write_requests(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    requests = [
        TracedRequest(arrival_s=0.0, prompt_tokens=None, output_tokens=None, prompt=text)
        for text in texts
    ]
    write_own_trace(path, requests)
    return path


_COLUMNS = [
    "requests",
    "ttft_ms",
    "tpot_ms",
    "usd",
    "resident_usd",
    "hit_rate",
    "calls_a_token",
    "main_gb_s",
    "remote_gb_s",
]


def _means(rounds: Sequence[LoadFigures]) -> list[Cell]:
    """By request: each round weighs as much as it completed."""
    done = [one.completed for one in rounds]

    def mean(values: Iterable[float | None]) -> float | None:
        known = list(values)
        if not sum(done) or any(value is None for value in known):
            return None
        return float(np.average(np.array(known, float), weights=done))

    return [
        sum(done),
        mean(one.ttft_ms.mean for one in rounds),
        mean(one.tpot_ms.mean for one in rounds),
        mean(one.usd for one in rounds),
        mean(one.resident_usd for one in rounds),
        mean(one.hit_rate for one in rounds),
        mean(one.remote_calls_per_token for one in rounds),
        mean((one.main_gb_s or 0.0) / max(1, one.completed) for one in rounds),
        mean((one.remote_gb_s or 0.0) / max(1, one.completed) for one in rounds),
    ]


def measured_comparisons(measured: Series) -> list[Comparison]:
    rows = {str(row["way"]).split(":", maxsplit=1)[0]: row for row in measured.named()}
    mix = rows["MIX"]
    found = []
    for name, row in rows.items():
        if name == "MIX":
            continue
        usd, resident, slower = (
            float(row[column] or 0) / float(mix[column] or np.nan)
            for column in ("usd", "resident_usd", "tpot_ms")
        )
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


def measured_picture(measured: Series) -> Picture:
    drawn, axes = figure(1, 2, height=2.8)
    names = [str(name).replace(", ", ",\n").replace(": ", ":\n") for name in measured.column("way")]
    places = np.arange(len(names))
    for offset, ledger, colour in ((-0.2, "usd", COLOURS[0]), (0.2, "resident_usd", COLOURS[1])):
        title = "papers' ledger" if ledger == "usd" else "memory held"
        axes[0].bar(places + offset, 1e6 * measured.numbers(ledger), 0.4, color=colour, label=title)
    axes[0].set_xticks(places, names, fontsize=7)
    label(axes[0], "", "USD for a million requests", "Default model, measured")
    legend(axes[0])
    axes[1].bar(places, measured.numbers("tpot_ms"), 0.5, color=COLOURS[2])
    axes[1].set_xticks(places, names, fontsize=7)
    label(axes[1], "", "TPOT, mean, ms", None)
    return Picture("measured", "The default model on the local platform.", drawn)
