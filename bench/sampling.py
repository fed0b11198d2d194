"""What choosing one sampled token costs, against transformers' own filters on the same row.

    python bench/sampling.py --vocabulary 49152

Logits are normal with a spread of 3, as a language model's roughly are, rounded to bfloat16. Both
ways by turns in one process; medians and minima of many rows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from main_model_fn.sampling import choose_token
from remoe.generation import SamplingParams

CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "top-p": SamplingParams(temperature=0.7, top_p=0.9),
    "top-k": SamplingParams(temperature=0.7, top_k=50),
    "top-k, top-p": SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    "min-p": SamplingParams(temperature=0.7, min_p=0.05),
}


def library_choice(row: torch.Tensor, params: SamplingParams) -> int:
    """As `generate` samples."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return int(torch.multinomial(warpers(None, row[None]).softmax(-1), 1))


def milliseconds(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':14}{'ours, ms: median (min)':>24}{'generate':>20}{'ratio':>8}")
    for name, params in CASES.items():
        ours, theirs = [], []
        for seed in range(arguments.rows):
            source = torch.Generator().manual_seed(seed)
            row = 3 * torch.randn(arguments.vocabulary, generator=source)
            row = row.bfloat16().float()
            logits = row.numpy()

            def choose(logits=logits, params=params, seed=seed) -> int:  # type: ignore[no-untyped-def]  # noqa: ANN001
                return choose_token(logits, params, seed=seed, generated=[])

            ours.append(milliseconds(choose))
            theirs.append(milliseconds(lambda row=row, params=params: library_choice(row, params)))  # type: ignore[misc]
        medians = statistics.median(ours), statistics.median(theirs)
        print(
            f"{name:14}{medians[0]:16.3f} ({min(ours):.3f}){medians[1]:12.3f} "
            f"({min(theirs):.3f}){medians[1] / medians[0]:7.1f}x"
        )


if __name__ == "__main__":
    main()
