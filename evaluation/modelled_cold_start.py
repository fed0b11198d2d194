"""Cold starts of published models' shapes: libraries as measured, and weights by a host's disk.

For models whose weights, not Python's libraries, are most of a start. The main function reads what
it keeps; expert functions start beside it, each on a host of its own, and read theirs.
"""

from __future__ import annotations

import numpy as np

from evaluation.cost_model import Case, cost_of_requests
from evaluation.hosts import DEFAULT_HOST, Host, load_host
from evaluation.modelled_cost import PUBLISHED, skew_of
from evaluation.prompts import known_prompts
from evaluation.results import Cell, Comparison, Series
from evaluation.shapes import SHAPES, Shape
from evaluation.workbench import Workbench

__all__ = ["modelled_cold_starts", "modelled_comparisons"]

_REQUESTS = 3


def modelled_cold_starts(bench: Workbench, *, libraries_s: float, process_s: float) -> Series:
    """A row a model and way. As many experts are remote as the cost table's plans have it.

    `libraries_s` is what the main function takes to start without weights, `process_s` an expert
    function.
    """
    host = load_host(bench.options.host or DEFAULT_HOST)
    skew = skew_of(known_prompts(bench))
    rows: list[list[Cell]] = []
    for name in PUBLISHED:
        shape = SHAPES[name]
        remote = bench.item(
            f"{name}, what is remote",
            {"host": host, "shape": shape, "skew": repr(skew), "n": _REQUESTS},
            lambda of=shape: float(  # type: ignore[misc]
                np.mean(
                    [
                        one.remote_share
                        for one in cost_of_requests(host, of, Case(), skew, requests=_REQUESTS)
                    ]
                )
            ),
            float,
        )
        rows += _starts(host, shape, remote, libraries_s=libraries_s, process_s=process_s)
    return Series(
        name="modelled",
        columns=["model", "way", "remote_share", "read_gb", "seconds", "beside_s"],
        rows=rows,
    )


def _starts(
    host: Host, shape: Shape, remote: float, *, libraries_s: float, process_s: float
) -> list[list[Cell]]:
    whole = shape.non_expert_bytes + shape.experts_bytes
    kept = whole - remote * shape.experts_bytes
    function_bytes = remote * shape.experts_bytes / shape.moe_layers
    to_gpu = {"Remoe": shape.non_expert_bytes, "MIX": shape.non_expert_bytes, "CPU": 0.0}

    def start(way: str, read: float, share: float, beside_s: float) -> list[Cell]:
        moved = to_gpu.get(way, whole)
        seconds = libraries_s + read / host.disk_bytes_per_s + moved / host.copy_bytes_per_s
        return [shape.name, way, share, read / 1e9, max(seconds, beside_s), beside_s]

    others = [start(way, whole, 0.0, 0.0) for way in ("MIX", "CPU", "GPU", "Fetch")]
    return [
        start("Remoe", kept, remote, process_s + function_bytes / host.disk_bytes_per_s),
        *others,
    ]


def modelled_comparisons(modelled: Series) -> list[Comparison]:
    found = []
    for name in PUBLISHED:
        rows = {str(row["way"]): row for row in modelled.named() if row["model"] == name}
        seconds = {way: float(row["seconds"] or 0) for way, row in rows.items()}
        remoe = rows["Remoe"]
        found.append(
            Comparison(
                what=f"cold start, {name}, modelled",
                paper="47 % lower (57.14 % in its section V-E)"
                if name == "DeepSeek-V2-Lite"
                else None,
                ours=f"Remoe {seconds['Remoe']:.1f} s, MIX {seconds['MIX']:.1f} s "
                f"({seconds['Remoe'] / seconds['MIX'] - 1:+.0%}), GPU {seconds['GPU']:.1f} s "
                f"({seconds['Remoe'] / seconds['GPU'] - 1:+.0%}); its main function reads "
                f"{float(remoe['read_gb'] or 0):.1f} GB, {float(remoe['remote_share'] or 0):.0%} of "
                "the experts are elsewhere",
                same_setting=False,
                gap="libraries as measured here, weights at the host's disk; expert functions on "
                "other hosts: on one disk all would read as much as MIX",
            )
        )
    return found
