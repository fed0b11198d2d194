"""Do similar prompts activate similar experts? Similarity against divergence, pair by pair (Fig. 3).

The paper draws one prompt of LMSYS-Chat-1M against 15 others, on GPT2-moe. Here every held-out
prompt is compared with its 15 most similar prompts of the history and with 15 drawn at random, for
the paper's similarity (eq. 11) and for the learned one that predictions use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.prompts import KnownPrompts, known_prompts, set_of
from evaluation.results import Comparison, Picture, Series, TableResult
from evaluation.rivals import history_of
from evaluation.workbench import Workbench
from loadgen.plots.style import BLUE, GREY, ORANGE, figure, label, legend
from planner.divergence import js_divergence
from planner.history_store import Entry
from planner.phases import normalise_rows
from planner.prediction import MeanPredictor
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit

__all__ = ["make", "rank_correlation"]

NEAREST = 15
_DRAWN = 2_000


def make(bench: Workbench) -> TableResult:
    known = known_prompts(bench)
    pairs = bench.item(
        "pairs",
        {
            "model": known.identity.model_digest,
            "train": len(known.train),
            "held_out": [entry.topic for entry in known.held_out],
            "source": known.source,
        },
        lambda: _pairs(known),
        Series,
    )
    by_set = _by_set(pairs)
    everything = by_set.rows[0]
    overall = dict(zip(by_set.columns, everything, strict=True))
    negative = sum(1 for row in by_set.rows[1:] if float(row[2] or 0) < 0)
    comparisons = [
        Comparison(
            what="similar prompts activate similar experts",
            paper="they correlate (one prompt against 15; no coefficient given)",
            ours=f"Pearson {overall['pearson_paper']:.2f}, rank {overall['rank_paper']:.2f} between "
            f"similarity (eq. 11) and JS divergence, over {overall['pairs']:,} pairs",
            same_setting=False,
            gap="another model and other prompts: GPT2-moe's converted weights and LMSYS-Chat-1M "
            "are not to be had; many more pairs",
        ),
        Comparison(
            what="in how many prompt sets",
            paper=None,
            ours=f"{negative} of {len(by_set.rows) - 1} sets have a negative correlation",
            same_setting=False,
            gap="the paper shows one set",
        ),
        Comparison(
            what="the learned similarity instead",
            paper=None,
            ours=f"Pearson {overall['pearson_learned']:.2f}, rank {overall['rank_learned']:.2f}",
            same_setting=False,
            gap="ours: 32 directions in which the routers differ, learned from the history",
        ),
    ]
    return TableResult(
        comparisons=comparisons,
        series=[pairs, by_set],
        pictures=[_scatter(pairs)],
        notes=[
            f"Prompts: {known.source}.",
            (
                "Divergence is Jensen-Shannon in nats, the mean over layers, of what was activated while "
                "the prompts were read."
            ),
        ],
    )


def _pairs(known: KnownPrompts) -> Series:
    history = history_of(known.train, known.identity)
    fit = RoutingFit.of(*RegressionPredictor(history, MeanPredictor(history)).sample())
    vectors, profiles = _arrays(known.train)
    asked, truths = _arrays(known.held_out)
    similarity = asked @ vectors.T  # [held out, train]
    learned = fit.project(asked) @ fit.project(vectors).T
    chance = np.random.default_rng(0)
    layers = list(known.model.moe_layers)
    rows: list[list[str | int | float | bool | None]] = []
    for row, entry in enumerate(known.held_out):
        nearest = np.argsort(-similarity[row])[:NEAREST]
        drawn = chance.choice(len(vectors), min(NEAREST, len(vectors)), replace=False)
        for kind, others in (("nearest", nearest), ("random", drawn)):
            truth = np.broadcast_to(truths[row], profiles[others].shape)
            divergence = js_divergence(profiles[others], truth)[:, layers].mean(axis=1)
            rows += [
                [
                    set_of(entry),
                    kind,
                    round(float(similarity[row, other]), 5),
                    round(float(learned[row, other]), 5),
                    round(float(value), 6),
                ]
                for other, value in zip(others, divergence, strict=True)
            ]
    return Series(
        name="pairs",
        columns=["set", "drawn", "similarity_paper", "similarity_learned", "js_nats"],
        rows=rows,
    )


def _arrays(entries: list[Entry]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors [entries, dimension] and prefill profiles [entries, layers, experts]."""
    vectors = np.stack([entry.vector for entry in entries])
    return vectors, normalise_rows(np.stack([entry.prefill for entry in entries]))


def _by_set(pairs: Series) -> Series:
    sets = np.array(pairs.column("set"))
    divergence = pairs.numbers("js_nats")
    measures = [pairs.numbers(name) for name in ("similarity_paper", "similarity_learned")]
    rows: list[list[str | int | float | bool | None]] = []
    for name in ("all", *np.unique(sets).tolist()):
        of = sets == name if name != "all" else np.ones(len(sets), np.bool_)
        rows.append(
            [
                name,
                int(of.sum()),
                *(
                    round(correlate(values[of], divergence[of]), 4)
                    for values in measures
                    for correlate in (correlation, rank_correlation)
                ),
            ]
        )
    return Series(
        name="correlations",
        columns=[
            "set",
            "pairs",
            "pearson_paper",
            "rank_paper",
            "pearson_learned",
            "rank_learned",
        ],
        rows=rows,
    )


def correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's: Pearson's of the ranks, equal values at their mean rank."""
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _scatter(pairs: Series) -> Picture:
    drawn, axes = figure(1, 2, height=3.4)
    kinds = np.array(pairs.column("drawn"))
    divergence = pairs.numbers("js_nats")
    chance = np.random.default_rng(0)
    shown = np.zeros(len(kinds), np.bool_)
    shown[chance.permutation(len(kinds))[:_DRAWN]] = True
    for place, (name, title) in enumerate(
        (
            ("similarity_paper", "The paper's similarity (eq. 11)"),
            ("similarity_learned", "The learned similarity"),
        )
    ):
        values = pairs.numbers(name)
        for kind, colour in (("random", GREY), ("nearest", BLUE)):
            of = (kinds == kind) & shown
            axes[place].scatter(
                values[of],
                divergence[of],
                s=5,
                color=colour,
                alpha=0.5,
                label=kind,
                linewidths=0,
                rasterized=True,
            )
        if values.std() > 0:
            slope, start = np.polyfit(values, divergence, 1)
            ends = np.array([values.min(), values.max()])
            axes[place].plot(ends, slope * ends + start, color=ORANGE, label="least squares")
        label(axes[place], "similarity", "JS divergence, nats", title)
        legend(axes[place])
    return Picture(
        "similarity",
        "Pairs of prompts: how similar they are, and how far their activations are apart.",
        drawn,
    )
