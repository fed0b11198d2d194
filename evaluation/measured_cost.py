"""What a request of the default model costs each way, measured end to end on the local platform (A.14).

The paper's requests: 500 characters read, 200 tokens written, one after another. They are sent in
rounds, each way in turn, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluation.platform import Deployed, LoadFigures, figures_of, load, platform
from evaluation.prompts import KnownPrompts, set_of
from evaluation.results import Cell, Comparison, Picture, Series
from evaluation.workbench import Workbench
from loadgen.config import LoadConfig
from loadgen.corpus import DEFAULT_CORPUS, read_corpus
from loadgen.plots.style import COLOURS, GREY, figure, label, logarithmic
from loadgen.readers.own import write_own_trace
from loadgen.trace import TracedRequest
from planner.history_file import write_history
from planner.history_store import Entry, HistoryIdentity
from remoe.checkpoint import Checkpoint
from remoe.errors import UnavailableError

__all__ = ["measured_comparisons", "measured_cost", "measured_picture", "one_task_cost"]

_CHARACTERS = 500
_TOKENS, _QUICK_TOKENS = 200, 16
_ROUND, _QUICK_ROUND, _FEW = 5, 3, 2
_PLANNED_WARM_UP = 5  # the partition follows what comes
# The paper's WikiText-2, and a task: to answer a question on a passage.
_TASKS = ("wikitext2", "boolq")
_PLANNED = Deployed(name="Remoe, planned", planned=True)
_HALF = Deployed(name="Remoe, half of the experts remote", remote_ratio=0.5)
_MIX = Deployed(name="MIX: every expert resident", remote_ratio=0.0)
_ALL = Deployed(name="every expert remote", remote_ratio=1.0)


def measured_cost(bench: Workbench) -> Series:
    """A row a way; times and both bills are means of its requests.

    Every expert remote is a bound, not a way to serve: a few requests are enough of it.
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
        if way is not _ALL:
            found[way].append(_round(bench, way, number, texts))
        elif number == 0:
            found[way].append(_round(bench, way, number, texts[:_FEW]))
    rows: list[list[Cell]] = [[way.name, *_means(figures)] for way, figures in found.items()]
    return Series(name="measured", columns=["way", *_COLUMNS], rows=rows)


def one_task_cost(bench: Workbench, known: KnownPrompts) -> Series:
    """The same where all requests are of one task, and the least used half is that of its history.

    Without `--prompts` there are no tasks, and no rows.
    """
    rows: list[list[Cell]] = []
    for task in _TASKS if bench.options.prompts is not None and not bench.options.quick else ():
        history = [entry for entry in known.train if set_of(entry) == task]
        model_dir = _with_history(bench, task, history, known.identity)
        texts = _prompts(bench, _ROUND, task)
        for way in (_HALF, _MIX):
            of_task = replace(way, name=f"{task}, {way.name}", model_dir=model_dir)
            rows.append([task, way.name, *_means([_round(bench, of_task, 0, texts)])])
    return Series(name="one_task", columns=["task", "way", *_COLUMNS], rows=rows)


def _with_history(
    bench: Workbench, task: str, history: Sequence[Entry], identity: HistoryIdentity
) -> Path:
    """A folder of links to the model's files, with this history in place of its own."""
    model_dir = bench.options.model_dir
    folder = bench.folder / task / model_dir.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in model_dir.iterdir():
        link = folder / path.name
        if path.name != "history.npz" and not link.exists():
            link.symlink_to(path.resolve())
    write_history(folder / "history.npz", history, identity)
    return folder


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
            warm_up=_PLANNED_WARM_UP if way.planned else 1,
        )
        with platform(bench, way) as running:
            name = f"{way.name}-{number}".replace(":", "").replace(",", "").replace(" ", "-")
            figures = figures_of(load(bench, running, config, name))
        if figures.failed:
            raise UnavailableError(
                f"{figures.failed} of {len(texts)} requests of {name} failed; its requests.jsonl "
                f"below {bench.folder / 'runs'} says why"
            )
        return figures

    return bench.item(
        f"{way.name.replace(':', ',')}, round {number + 1}",
        {
            "model": Checkpoint.open(bench.options.model_dir).digest,
            "way": [way.name, way.remote_ratio, way.planned, way.window],
            "prompts": texts,
            "tokens": tokens,
            "hardware": hardware.name if way.planned and hardware else None,
        },
        measure,
        LoadFigures,
    )


def _prompts(bench: Workbench, count: int, task: str | None = None) -> list[str]:
    """So many of 500 characters, drawn from all sets or topics, or from one set."""
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
        texts = [
            prompt.text[:_CHARACTERS]
            for prompt in held_out
            if task is None or prompt.label.startswith(f"{task}/")
        ]
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


def measured_comparisons(measured: Series, one_task: Series) -> list[Comparison]:
    mixed = [{"task": "prompts of all sets", **row} for row in measured.named()]
    rows = [*mixed, *one_task.named()]
    mix = {row["task"]: row for row in rows if row["way"] == _MIX.name}
    found = []
    for row in rows:
        if row["way"] == _MIX.name:
            continue
        usd, resident, slower = (
            float(row[column] or 0) / float(mix[row["task"]][column] or np.nan)
            for column in ("usd", "resident_usd", "tpot_ms")
        )
        found.append(
            Comparison(
                what=f"default model end to end, {row['task']}: {row['way']}, against MIX",
                paper="GPT2-moe: Remoe lowest overall, small differences",
                ours=f"{usd:.2f} of MIX's cost by the papers' ledger, {resident:.2f} by memory held; "
                f"TPOT {slower:.2f} of MIX's",
                same_setting=False,
                gap="no GPU, and 2 cores shared by all functions; one partition for all requests, "
                "where the paper has one for each",
            )
        )
    return found


def measured_picture(measured: Series, one_task: Series) -> Picture:
    """Cost by both ledgers and TPOT, each way against MIX on the same requests."""
    mixed = [{"task": "all sets", **row} for row in measured.named()]
    rows = [*mixed, *one_task.named()]
    mix = {row["task"]: row for row in rows if row["way"] == _MIX.name}
    shown = [row for row in rows if row["way"] != _MIX.name]
    drawn, axes = figure(1, 1, height=0.9 + 0.55 * len(shown), width=8)
    places = np.arange(len(shown))
    for index, (column, name) in enumerate(
        (
            ("usd", "cost, papers' ledger"),
            ("resident_usd", "cost, memory held"),
            ("tpot_ms", "TPOT"),
        )
    ):
        values = np.array(
            [float(row[column] or 0) / float(mix[row["task"]][column] or np.nan) for row in shown]
        )
        where, colour = places + 0.26 * (index - 1), COLOURS[index]
        bars = axes[0].barh(where, values - 1, 0.24, left=1, color=colour, label=name)
        axes[0].bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axes[0].axvline(1, color=GREY, linewidth=1)
    names = [f"{str(row['way']).removeprefix('Remoe, ')}\n({row['task']})" for row in shown]
    axes[0].set_yticks(places, names, fontsize=8)
    axes[0].invert_yaxis()
    logarithmic(axes[0], "x")
    label(axes[0], "of MIX's, on the same requests", "", None)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    return Picture("measured", "The default model on the local platform, against MIX.", drawn)
