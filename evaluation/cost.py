"""What a request costs: CPU, GPU, Fetch, MIX and Remoe (A.13, A.14), modelled and measured."""

from __future__ import annotations

from evaluation.hosts import DEFAULT_HOST, load_host
from evaluation.measured_cost import (
    measured_comparisons,
    measured_cost,
    measured_picture,
    one_task_cost,
)
from evaluation.modelled_cost import modelled_cost
from evaluation.prompts import known_prompts
from evaluation.results import TableResult
from evaluation.workbench import Workbench
from remoe.prices import DEFAULT_PRICES

__all__ = ["make"]


def make(bench: Workbench) -> TableResult:
    host = load_host(bench.options.host or DEFAULT_HOST)
    known = known_prompts(bench)
    modelled = modelled_cost(bench, host, known)
    measured, one_task = measured_cost(bench), one_task_cost(bench, known)
    skew = modelled.skew
    return TableResult(
        comparisons=[*modelled.comparisons(), *measured_comparisons(measured, one_task)],
        series=[modelled.requests, modelled.sweeps, measured, one_task],
        pictures=[modelled.picture(), measured_picture(measured, one_task)],
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
