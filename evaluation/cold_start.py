"""Cold starts by stage, of real processes, with the model's files in the page cache and not (A.14).

Remoe's main function loads half of the experts while its expert functions start beside it; MIX's
loads all of them; CPU and GPU are the whole model in transformers. The paper's stages: the main
model, REMOTE beside it, and CALCULATE, the planner's own time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from evaluation.modelled_cold_start import modelled_cold_starts, modelled_comparisons
from evaluation.page_cache import cached_share, drop, warm
from evaluation.results import Cell, Comparison, Picture, Series, TableResult
from evaluation.workbench import Workbench
from loadgen.plots.style import COLOURS, figure, label
from main_model_fn.call_times import expert_call
from main_model_fn.http_transport import HttpTransport
from remoe.checkpoint import Checkpoint
from remoe.cli.hardware.functions import FunctionProcess, layers_env, libraries_s
from remoe.errors import SettingsError

__all__ = ["make"]

_CACHES = ("warm", "cold")
_NO_GPU = "needs a GPU, and this machine has none"


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by stage, in order, and of the whole; `beside` runs at the same time as the others."""

    stages: dict[str, float]
    beside: dict[str, float] = {}
    cached: float = 0.0

    @property
    def total_s(self) -> float:
        return max(sum(self.stages.values()), sum(self.beside.values()))


def make(bench: Workbench) -> TableResult:
    bench.options.out.mkdir(parents=True, exist_ok=True)
    starts = _starts(bench)
    stages = {str(row["stage"]): float(row["seconds"] or 0) for row in reversed(starts.named())}
    modelled = modelled_cold_starts(
        bench, libraries_s=stages["libraries"], process_s=stages["remote: process"]
    )
    missing = [] if _has_gpu() else [f"GPU and Fetch: {_NO_GPU}."]
    return TableResult(
        comparisons=[*_compared(starts), *modelled_comparisons(modelled)],
        series=[starts, modelled],
        pictures=[_picture(starts)],
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


def _starts(bench: Workbench) -> Series:
    # A copy of the model that nobody else has mapped, so that it can leave the page cache.
    with tempfile.TemporaryDirectory(dir=bench.options.out, prefix="model-") as folder:
        model_dir = Path(folder) / "model"
        shutil.copytree(bench.options.model_dir, model_dir)
        return _starts_of(bench, model_dir)


def _starts_of(bench: Workbench, model_dir: Path) -> Series:
    count = 1 if bench.options.quick else 5
    ways: dict[str, Callable[[bool], _Start]] = {
        "Remoe": lambda cold: _main_function(model_dir, 0.5, cold=cold),
        "MIX": lambda cold: _main_function(model_dir, 0.0, cold=cold),
        "CPU": lambda _: _whole_model(model_dir, "cpu"),
    }
    if _has_gpu():
        ways["GPU"] = lambda _: _whole_model(model_dir, "cuda")
    rows: list[list[Cell]] = []
    for cache in _CACHES:
        for name, way in ways.items():

            def measure(of: Callable[[bool], _Start] = way, at: str = cache) -> list[_Start]:
                return [_with_cache(model_dir, at == "cold", of) for _ in range(count)]

            starts = bench.item(
                f"{name}, {cache}",
                {"model": Checkpoint.open(model_dir).digest, "starts": count},
                measure,
                list[_Start],
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


def _with_cache(model_dir: Path, cold: bool, way: Callable[[bool], _Start]) -> _Start:
    (drop if cold else warm)(model_dir)
    cached = cached_share(model_dir)
    return msgspec.structs.replace(way(cold), cached=cached)


def _main_function(model_dir: Path, remote_ratio: float, *, cold: bool) -> _Start:
    """The main function of a deployment that a real planner decides, and an expert function."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"REMOE_PLANNER_REMOTE_RATIO": str(remote_ratio)}
        history = model_dir / "history.npz"
        if history.exists():
            env["REMOE_PLANNER_HISTORY"] = str(history)
        with FunctionProcess("planner", model_dir, Path(folder), env) as planner:
            planner.start()
            plan_s = _plan_s(planner.url, Checkpoint.open(model_dir))
            imports_s = libraries_s()
            if cold:
                drop(model_dir)  # what the planner read
            with FunctionProcess(
                "main_model_fn", model_dir, Path(folder), {}, planner_url=planner.url
            ) as main:
                main_s = main.start()
        beside = {"plan": plan_s}
        if remote_ratio > 0:
            if cold:
                drop(model_dir)  # what the main function read
            beside |= _expert_function(model_dir, Path(folder))
    return _Start(
        # Imported apart from the function's own start, which alone is the whole.
        stages={
            "libraries": min(imports_s, main_s),
            "model and cache": max(0.0, main_s - imports_s),
        },
        beside=beside,
    )


def _plan_s(planner_url: str, checkpoint: Checkpoint) -> float:
    """CALCULATE: a plan for a prompt of 125 tokens and 200 to write, or what the model holds."""
    most = checkpoint.context_length // 4
    tokens = [token % checkpoint.vocab_size for token in range(min(125, most))]
    body = json.dumps(
        {"model": "profiled", "prompt_tokens": tokens, "max_new_tokens": min(200, most)}
    ).encode()
    before = time.perf_counter()
    request = urllib.request.Request(  # noqa: S310  # our own address
        f"{planner_url}/v1/plan", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        response.read()
    return time.perf_counter() - before


def _expert_function(model_dir: Path, folder: Path) -> dict[str, float]:
    checkpoint = Checkpoint.open(model_dir)
    env = layers_env(checkpoint)
    with FunctionProcess("expert_fn", model_dir, folder, env) as function:
        process_s = function.start()
        transport = HttpTransport(function.topology, timeout_s=30.0)
        try:
            before = time.perf_counter()
            transport.send(expert_call(checkpoint, checkpoint.moe_layers[0], 1)).result()
            first_s = time.perf_counter() - before
        finally:
            transport.close()
    return {"remote: process": process_s, "remote: first call": first_s}


def _whole_model(model_dir: Path, device: str) -> _Start:
    before = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.whole_model", device, str(model_dir)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    whole_s = time.perf_counter() - before
    if done.returncode:
        raise SettingsError(f"the whole model did not start: {done.stderr.strip()[-500:]}")
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return _Start(stages={"process": max(0.0, whole_s - sum(stages.values())), **stages})


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


def _picture(starts: Series) -> Picture:
    drawn, axes = figure(1, 1, height=3.2)
    at, ticks = 0, []
    names = list(dict.fromkeys(str(row["stage"]) for row in starts.named()))
    colours = dict(zip(names, COLOURS * 2, strict=False))
    labelled: set[str] = set()
    for cache in _CACHES:
        for way in dict.fromkeys(str(name) for name in starts.column("way")):
            rows = [
                row for row in starts.named() if row["way"] == way and row["page_cache"] == cache
            ]
            for parallel in (False, True):
                left = 0.0
                for row in rows:
                    if row["beside"] is not parallel:
                        continue
                    stage, spent = str(row["stage"]), float(row["seconds"] or 0)
                    axes[0].barh(
                        at + (0.25 if parallel else -0.15),
                        spent,
                        0.2 if parallel else 0.5,
                        left=left,
                        color=colours[stage],
                        label=None if stage in labelled else stage,
                    )
                    labelled.add(stage)
                    left += spent
            ticks.append(f"{way}, {cache}")
            at += 1
    axes[0].set_yticks(range(len(ticks)), ticks)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    label(axes[0], "s", "", "From nothing to ready; below, what starts beside it")
    return Picture("cold_start", "Cold starts by stage, page cache warm and cold.", drawn)
