"""Figures of routing from profiled prompts: how topical, how skewed, how balanced.

python -m models.smollm2_8x135m.routing profiles.npz
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_PAIRS = 20_000


def js_divergence(p: Floats, q: Floats) -> Floats:
    """Return the Jensen-Shannon divergence in nats over the last axis."""
    middle = (p + q) / 2

    def relative(a: Floats) -> Floats:
        terms = np.where(
            a > 0, a * np.log(np.where(a > 0, a, 1.0) / np.maximum(middle, 1e-300)), 0.0
        )
        return np.asarray(terms.sum(-1))

    return (relative(p) + relative(q)) / 2


def routing_figures(
    profiles: Floats, topic: NDArray[np.int32], topics: list[str]
) -> dict[str, float]:
    """Return the figures of profiles [prompts, layers, experts] with a "set/topic" label each."""
    profiles = profiles / profiles.sum(-1, keepdims=True)
    sets = np.array([label.split("/", 1)[0] for label in topics])[topic]
    random = np.random.default_rng(0)
    a, b = random.integers(0, len(profiles), (2, 40 * _PAIRS))
    a, b = a[a != b], b[a != b]

    def mean_of(chosen: NDArray[np.bool_]) -> float:
        first, second = a[chosen][:_PAIRS], b[chosen][:_PAIRS]
        if not len(first):
            return float("nan")
        return round(float(js_divergence(profiles[first], profiles[second]).mean()), 4)

    mean = profiles.mean(0)  # [layers, experts], every prompt alike
    ordered = np.sort(profiles, axis=-1)[..., ::-1]
    owners = [label.split("/", 1)[0] for label in topics]
    several = np.array([owners.count(owner) > 1 for owner in owners])[topic]
    return {
        "prompts": len(profiles),
        "js_same_topic": mean_of((topic[a] == topic[b]) & several[a]),
        "js_same_set": mean_of(sets[a] == sets[b]),
        "js_across_sets": mean_of(sets[a] != sets[b]),
        "js_to_global_mean": round(float(js_divergence(profiles, mean[None]).mean()), 4),
        "top_2_share": round(float(ordered[..., :2].sum(-1).mean()), 4),
        "bottom_4_share": round(float(ordered[..., -4:].sum(-1).mean()), 4),
        "min_expert_share": round(float(mean.min()), 4),
        "max_expert_share": round(float(mean.max()), 4),
    }


def main() -> None:
    """Print the figures of a profiles file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profiles", type=Path)
    with np.load(parser.parse_args().profiles, allow_pickle=False) as file:
        figures = routing_figures(
            file["profiles"].astype(np.float64), file["topic"], file["topics"].tolist()
        )
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
