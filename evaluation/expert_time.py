"""An expert's time by memory, with its exponential fit (Fig. 6), and by remote ratio (Fig. 4).

Memory means vCPUs: the paper's platform gives one with each GB. Allocations are those of
`remoe profile hardware`, up to the cores that are there. The second part computes what a layer's
remote experts are asked for one prompt, for every number of remote experts.
"""

from __future__ import annotations

import os
import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from evaluation.prompts import known_prompts
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.workbench import Workbench
from loadgen.plots.style import COLOURS, figure, label, legend, logarithmic
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.allocations import allocations_of, measure_expert_speed
from remoe.experts import ExpertId
from remoe.hardware import ExponentialFit
from remoe.kernel.interface import ExpertKernel, RoutedRows, open_kernel

__all__ = ["make", "rows_for"]

_ROWS = (1, 4, 32)
_CALLS = 4
_PROMPT_TOKENS = 128  # 500 characters, as in the paper's cost runs
_PAPER_THETA2 = "2.44 (DeepSeek-V2-Lite), 11.87 (GPT2-moe) per GB"


def make(bench: Workbench) -> TableResult:
    by_memory = _by_memory(bench)
    fits = _fits(by_memory)
    by_ratio = _by_ratio(bench)
    lines = _lines(by_ratio)
    return TableResult(
        comparisons=[*_of_fits(fits), *_of_lines(lines)],
        series=[by_memory, fits, by_ratio, lines],
        pictures=[_picture(by_memory, fits, by_ratio)],
        notes=[
            (
                "1 GB brings 1 vCPU, as the paper assumes; fractions of a core are made by stopping "
                "and continuing the process, as CFS quotas do."
            )
        ],
    )


def _by_memory(bench: Workbench) -> Series:
    model_dir = bench.options.model_dir
    digest = Checkpoint.open(model_dir).digest
    cores = len(os.sched_getaffinity(0))
    seconds = 0.1 if bench.options.quick else 1.0
    rows: list[list[Cell]] = []
    for vcpus in allocations_of(cores):
        took = bench.item(
            f"experts on {vcpus:g} vCPUs",
            {"model": digest, "vcpus": vcpus, "cores": cores, "seconds": seconds},
            lambda at=vcpus: measure_expert_speed(  # type: ignore[misc]
                model_dir, at, list(_ROWS), seconds=seconds
            ),
            list[float],
        )
        rows += [[vcpus, count, 1e3 * one] for count, one in zip(_ROWS, took, strict=True)]
    return Series(name="by_memory", columns=["gb", "rows", "ms"], rows=rows)


def _fits(by_memory: Series) -> Series:
    gb, counts, ms = (by_memory.numbers(name) for name in by_memory.columns)
    rows: list[list[Cell]] = []
    for count in _ROWS:
        of = counts == count
        fit = ExponentialFit.of(gb[of], ms[of] / 1e3)
        rows.append([count, 1e3 * fit.theta1, fit.theta2, 1e3 * fit.theta3, fit.r_squared])
    return Series(
        name="fits",
        columns=["rows", "theta1_ms", "theta2_per_gb", "theta3_ms", "r_squared"],
        rows=rows,
    )


def _by_ratio(bench: Workbench) -> Series:
    """A layer's remote experts for one prompt and for decoded tokens, by how many are remote."""
    model_dir = bench.options.model_dir
    checkpoint = Checkpoint.open(model_dir)
    known = known_prompts(bench)
    shares = np.mean([entry.prefill for entry in known.train], axis=0)[list(checkpoint.moe_layers)]
    repeats = 3 if bench.options.quick else 30
    rows: list[list[Cell]] = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for routing in ("uniform", "least used first"):
            use = np.full_like(shares, 1 / checkpoint.experts) if routing == "uniform" else shares
            for tokens in (1, _PROMPT_TOKENS):

                def measure(
                    of: int = threads, by: NDArray[np.float32] = use, prompt: int = tokens
                ) -> list[float]:
                    return _layer_times(checkpoint, by, threads=of, tokens=prompt, repeats=repeats)

                took = bench.item(
                    f"{routing}, {tokens} tokens, {threads} threads",
                    {
                        "model": checkpoint.digest,
                        "repeats": repeats,
                        "history": len(known.train),
                    },
                    measure,
                    list[float],
                )
                rows += [
                    [routing, threads, tokens, count / checkpoint.experts, 1e3 * one]
                    for count, one in enumerate(took)
                ]
    return Series(
        name="by_ratio",
        columns=["routing", "threads", "tokens", "remote_ratio", "ms_a_layer"],
        rows=rows,
    )


def _layer_times(
    checkpoint: Checkpoint,
    shares: NDArray[np.float32],
    *,
    threads: int,
    tokens: int,
    repeats: int,
) -> list[float]:
    """Seconds of a layer's remote experts for 0, 1, ... all of them remote: the mean over drawn
    routes, each the shortest of some calls.

    `shares` are [moe layers, experts]; the least used become remote first.
    """
    kernel = open_kernel(
        checkpoint.expert, "auto", activation=checkpoint.activation, threads=threads
    )
    chance = np.random.default_rng(0)
    draws = repeats * (16 if tokens == 1 else 1)
    times = np.zeros((checkpoint.experts + 1, draws))
    for turn in range(draws):
        place = turn % len(checkpoint.moe_layers)
        layer = checkpoint.moe_layers[place]
        chosen = _routes(shares[place], tokens, checkpoint.top_k, chance)
        order = np.argsort(shares[place], kind="stable")
        for count in range(1, checkpoint.experts + 1):
            experts, rows = rows_for(
                layer, sorted(order[:count].tolist()), chosen, checkpoint.hidden_size
            )
            if experts:
                times[count, turn] = min(_call_s(kernel, experts, rows) for _ in range(_CALLS))
    return [float(value) for value in times.mean(axis=1)]


def _routes(
    shares: NDArray[np.float32], tokens: int, top_k: int, chance: np.random.Generator
) -> NDArray[np.intp]:
    """Each token's experts, [tokens, top_k], drawn without replacement by their shares."""
    keys = np.log(np.maximum(shares, 1e-6)) + chance.gumbel(size=(tokens, len(shares)))
    routes: NDArray[np.intp] = np.argsort(-keys, axis=1)[:, :top_k]
    return routes


def _call_s(kernel: ExpertKernel, experts: list[ExpertId], rows: RoutedRows) -> float:
    start = time.perf_counter()
    kernel.weighted_sum(experts, rows)
    return time.perf_counter() - start


def rows_for(
    layer: int, remote: list[int], chosen: NDArray[np.intp], hidden_size: int
) -> tuple[list[ExpertId], RoutedRows]:
    """What the remote experts of a layer are asked: only those that some token chose."""
    asked = [(index, np.flatnonzero((chosen == index).any(axis=1))) for index in remote]
    asked = [(index, tokens) for index, tokens in asked if len(tokens)]
    offsets = np.cumsum([0, *(len(tokens) for _, tokens in asked)])
    index = np.concatenate([tokens for _, tokens in asked]) if asked else np.zeros(0)
    return [ExpertId(layer, expert) for expert, _ in asked], RoutedRows(
        np.full((len(chosen), hidden_size), 0.01, np.float32),
        offsets.tolist(),
        index.astype(np.int32),
        np.full(len(index), 0.5, np.float32),
    )


class _Line(msgspec.Struct, frozen=True):
    slope: float
    start: float
    r_squared: float


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> _Line:
    slope, start = np.polyfit(x, y, 1)
    total = float(((y - y.mean()) ** 2).sum())
    error = float(((slope * x + start - y) ** 2).sum())
    return _Line(float(slope), float(start), 1 - error / total if total else 1.0)


def _lines(by_ratio: Series) -> Series:
    keys = sorted({tuple(row[:3]) for row in by_ratio.rows}, key=str)
    rows: list[list[Cell]] = []
    for key in keys:
        of = [row for row in by_ratio.rows if tuple(row[:3]) == key]
        ratio = np.array([row[3] for row in of], float)
        line = _line(ratio, np.array([row[4] for row in of], float))
        rows.append([*key, line.slope, line.start, line.r_squared])
    return Series(
        name="lines",
        columns=["routing", "threads", "tokens", "ms_per_ratio", "ms_at_zero", "r_squared"],
        rows=rows,
    )


def _of_fits(fits: Series) -> list[Comparison]:
    theta2, r_squared = fits.numbers("theta2_per_gb"), fits.numbers("r_squared")
    each = ", ".join(
        f"{theta:.2f} at {row[0]} row{'s' * (row[0] != 1)} (R² {fit:.3f})"
        for theta, fit, row in zip(theta2, r_squared, fits.rows, strict=True)
    )
    return [
        Comparison(
            what="exponential fit of expert time by memory, θ2",
            paper=_PAPER_THETA2,
            ours=f"{each} per GB",
            same_setting=False,
            gap="another model and machine; up to as many vCPUs as this machine has cores, where "
            "time is near inverse to vCPUs: an exponential fits 1/y over a short range only",
        )
    ]


def _of_lines(lines: Series) -> list[Comparison]:
    def least(routing: str) -> float:
        return min(
            float(row["r_squared"] or 0) for row in lines.named() if row["routing"] == routing
        )

    return [
        Comparison(
            what="expert time is linear in the remote ratio",
            paper="about linear (5 and 10 cores; no coefficient given)",
            ours=f"R² of a line: at least {least('uniform'):.3f} with uniform routing, "
            f"{least('least used first'):.3f} when the least used experts go first",
            same_setting=False,
            gap="1 core and all of this machine's; choosing the least used first bends the line "
            "downwards, which is what the choice is for",
        )
    ]


def _picture(by_memory: Series, fits: Series, by_ratio: Series) -> Picture:
    drawn, axes = figure(1, 2, height=3.4)
    gb, counts, ms = (by_memory.numbers(name) for name in by_memory.columns)
    smooth = np.linspace(gb.min(), gb.max(), 200)
    for colour, row in zip(COLOURS, fits.rows, strict=False):
        count, theta1, theta2, theta3, _ = (float(value or 0) for value in row)
        of = counts == count
        name = f"{count:g} row{'s' * (count != 1)}"
        axes[0].plot(gb[of], ms[of], "o", color=colour, label=name)
        axes[0].plot(smooth, theta1 * np.exp(-theta2 * smooth) + theta3, color=colour)
    logarithmic(axes[0], "y")
    label(axes[0], "GB (= vCPUs)", "ms an expert", "By memory, and the exponential fit")
    legend(axes[0])
    keys = sorted({tuple(row[:2]) for row in by_ratio.rows}, key=str)
    for colour, (routing, threads) in zip(COLOURS, keys, strict=False):
        of_key = [row for row in by_ratio.rows if row[:2] == [routing, threads] and row[2] != 1]
        axes[1].plot(
            [float(row[3] or 0) for row in of_key],
            [float(row[4] or 0) for row in of_key],
            "o-",
            color=colour,
            label=f"{routing}, {threads} thread{'s' * (threads != 1)}",
        )
    label(axes[1], "share of a layer's experts that is remote", "ms a layer", "By remote ratio")
    legend(axes[1])
    return Picture(
        "expert_time",
        "One expert by its function's memory; a layer's remote experts for a prompt of "
        f"{_PROMPT_TOKENS} tokens by how many of them are remote.",
        drawn,
    )
