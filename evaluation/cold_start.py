"""Cold starts by stage, of real processes, with the model's files in the page cache and not (A.14).

Remoe's main function loads half of the experts while its expert functions start beside it; MIX's
loads all of them; CPU and GPU are the whole model in transformers. The paper's stages: the main
model, REMOTE beside it, and CALCULATE, the planner's own time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes

from evaluation.modelled_cold_start import modelled_cold_starts, modelled_comparisons
from evaluation.page_cache import cached_share, drop, warm
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.start_times import Start, start_main_function, start_whole_model
from evaluation.workbench import Workbench
from loadgen.plots.style import COLOURS, figure, label, legend
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import libraries_s

__all__ = ["make"]

_CACHES = ("warm", "cold")
_NO_GPU = "needs a GPU, and this machine has none"


def make(bench: Workbench) -> TableResult:
    bench.options.out.mkdir(parents=True, exist_ok=True)
    starts = _starts(bench)
    stages = {str(row["stage"]): float(row["seconds"] or 0) for row in reversed(starts.named())}
    count = _count(bench)
    # The modelled main functions have a GPU, beside which transformers serves.
    imports_s = bench.item(
        "importing transformers",
        {"starts": count},
        lambda: min(libraries_s(native=False) for _ in range(count)),
        float,
    )
    modelled = modelled_cold_starts(
        bench, libraries_s=imports_s, process_s=stages["remote: process"]
    )
    missing = [] if _has_gpu() else [f"GPU and Fetch: {_NO_GPU}."]
    return TableResult(
        comparisons=[*_compared(starts), *modelled_comparisons(modelled)],
        series=[starts, modelled],
        pictures=[_picture(starts, modelled)],
        notes=[
            (
                "The shortest of some starts. Cold: the model's files (a copy that nobody else has "
                "mapped) are dropped from the page cache first; `cached` is what stayed. Python's "
                "libraries stay cached."
            ),
            (
                "Remoe and MIX end with the first answer that the function is ready, CPU and GPU with "
                "a first token. What runs beside the main function is not added to it."
            ),
            *missing,
        ],
    )


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _count(bench: Workbench) -> int:
    return 1 if bench.options.quick else 5


def _starts(bench: Workbench) -> Series:
    # A copy of the model that nobody else has mapped, so that it can leave the page cache.
    with tempfile.TemporaryDirectory(dir=bench.options.out, prefix="model-") as folder:
        model_dir = Path(folder) / "model"
        shutil.copytree(bench.options.model_dir, model_dir)
        return _starts_of(bench, model_dir)


def _starts_of(bench: Workbench, model_dir: Path) -> Series:
    count = _count(bench)
    ways: dict[str, Callable[[bool], Start]] = {
        "Remoe": lambda cold: start_main_function(model_dir, 0.5, cold=cold),
        "MIX": lambda cold: start_main_function(model_dir, 0.0, cold=cold),
        "CPU": lambda _: start_whole_model(model_dir, "cpu"),
    }
    if _has_gpu():
        ways["GPU"] = lambda _: start_whole_model(model_dir, "cuda")
    rows: list[list[Cell]] = []
    for cache in _CACHES:
        for name, way in ways.items():

            def measure(of: Callable[[bool], Start] = way, at: str = cache) -> list[Start]:
                return [_with_cache(model_dir, at == "cold", of) for _ in range(count)]

            starts = bench.item(
                f"{name}, {cache}",
                {"model": Checkpoint.open(model_dir).digest, "starts": count},
                measure,
                list[Start],
            )
            shortest = min(starts, key=lambda start: start.total_s)
            cached = float(np.mean([start.cached for start in starts]))
            for parallel, stages in ((False, shortest.stages), (True, shortest.beside)):
                rows += [
                    [name, cache, stage, parallel, spent, shortest.total_s, cached]
                    for stage, spent in stages.items()
                ]
    return Series(
        name="stages",
        columns=["way", "page_cache", "stage", "beside", "seconds", "total_s", "cached"],
        rows=rows,
    )


def _with_cache(model_dir: Path, cold: bool, way: Callable[[bool], Start]) -> Start:
    (drop if cold else warm)(model_dir)
    cached = cached_share(model_dir)
    return msgspec.structs.replace(way(cold), cached=cached)


def _compared(starts: Series) -> list[Comparison]:
    rows = starts.named()
    total = {(str(row["way"]), str(row["page_cache"])): float(row["total_s"] or 0) for row in rows}
    found = []
    for cache in _CACHES:
        of = {name: seconds for (name, at), seconds in total.items() if at == cache}
        found.append(
            Comparison(
                what=f"cold start, page cache {cache}",
                paper="47 % lower (abstract; 57.14 % in its section V-E); against which baseline is "
                "not said",
                ours=", ".join(
                    f"{name} {seconds:.2f} s"
                    + (f" (Remoe {of['Remoe'] / seconds - 1:+.0%})" if name != "Remoe" else "")
                    for name, seconds in of.items()
                ),
                same_setting=False,
                gap="processes on one machine: no container is fetched and no GPU filled; weights "
                "are mapped, so that of a small model Python's libraries are most of a start",
            )
        )
    plan = [float(row["seconds"] or 0) for row in rows if row["stage"] == "plan"]
    found.append(
        Comparison(
            what="CALCULATE: planning while the main function starts",
            paper="negligible, adds no waiting",
            ours=f"{1e3 * min(plan):.0f} to {1e3 * max(plan):.0f} ms beside seconds of starting",
            same_setting=True,
            gap="the planner's first plan, over HTTP",
        )
    )
    return found


def _picture(starts: Series, modelled: Series) -> Picture:
    drawn, axes = figure(1, 2, height=3.6, width=11)
    _draw_stages(axes[0], starts)
    shapes = list(dict.fromkeys(str(name) for name in modelled.column("model")))
    ways = list(dict.fromkeys(str(name) for name in modelled.column("way")))
    places = np.arange(len(shapes))
    for index, way in enumerate(ways):
        values = [float(row["seconds"] or 0) for row in modelled.named() if row["way"] == way]
        axes[1].bar(places + 0.16 * (index - 2), values, 0.16, label=way, color=COLOURS[index])
    axes[1].set_xticks(places, shapes, fontsize=8)
    label(axes[1], "", "s", "Modelled: libraries as measured, weights from disk")
    legend(axes[1])
    return Picture(
        "cold_start",
        "From nothing to ready, by stage, page cache warm and cold; and as modelled for published "
        "shapes.",
        drawn,
    )


def _draw_stages(axes: Axes, starts: Series) -> None:
    """A bar a way, and below it a thin one of what starts beside it."""
    rows = starts.named()
    names = list(dict.fromkeys(str(row["stage"]) for row in rows))
    colours = dict(zip(names, (*COLOURS, "#2b2f36", "#f0e442"), strict=False))
    bars = list(dict.fromkeys((str(row["way"]), str(row["page_cache"])) for row in rows))
    labelled: set[str] = set()
    for place, bar in enumerate(bars):
        left = {False: 0.0, True: 0.0}
        for row in rows:
            if (row["way"], row["page_cache"]) != bar:
                continue
            stage, spent, beside = (
                str(row["stage"]),
                float(row["seconds"] or 0),
                bool(row["beside"]),
            )
            axes.barh(
                place + (0.25 if beside else -0.15),
                spent,
                0.2 if beside else 0.5,
                left=left[beside],
                color=colours[stage],
                label=None if stage in labelled else stage,
            )
            labelled.add(stage)
            left[beside] += spent
    axes.set_yticks(range(len(bars)), [f"{way}, {cache}" for way, cache in bars])
    axes.invert_yaxis()
    axes.legend(
        fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.16), frameon=False
    )
    label(axes, "s", "", "Measured; the thin bar is what starts beside")
