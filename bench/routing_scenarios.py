"""Whose rows go to which experts, batch by batch: drawn with a skew that drifts, or recorded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.recording import Recording

HISTORY = 8  # batches before the first drift, which EPLB has seen; they warm up everything, too


@dataclass(frozen=True)
class Scenario:
    """Routing of all batches: experts int64 [batches, layers, ranks x tokens, top_k]."""

    name: str
    experts: NDArray[np.int64]
    popularity: NDArray[np.float64]  # [batches, layers, experts]


def zipf_routing(args: argparse.Namespace, skew: float, drift_every: int) -> Scenario:
    """Top-k drawn without replacement; an expert's popularity is 1 / rank^skew."""
    random = np.random.default_rng(args.seed)
    base = 1 / np.arange(1, args.experts + 1) ** skew
    order = np.stack([random.permutation(args.experts) for _ in range(args.layers)])
    batches = HISTORY + args.batches
    shape = (args.layers, args.ranks * args.tokens, args.experts)
    experts, popularity = [], []
    for batch in range(batches):
        if drift_every and batch >= HISTORY and (batch - HISTORY) % drift_every == 0:
            for layer in range(args.layers):
                a, b = random.choice(args.experts, 2, replace=False)
                order[layer, [a, b]] = order[layer, [b, a]]
        shares = base[order]
        noise = random.gumbel(size=shape).astype(np.float32)
        scores = np.log(shares)[:, None, :].astype(np.float32) + noise
        top = np.argpartition(-scores, args.top_k - 1, axis=-1)[..., : args.top_k]
        experts.append(top.astype(np.int64))
        popularity.append(shares / shares.sum(-1, keepdims=True))
    drift = f"drift/{drift_every}" if drift_every else "steady"
    return Scenario(f"zipf {skew:g} {drift}", np.stack(experts), np.stack(popularity))


def recorded_routing(args: argparse.Namespace) -> Scenario:
    """A model's own routes, prompt after prompt, from the beginning again when they end.

    Prompts of a set follow each other, so that popularity drifts as their subjects do.
    """
    recording = Recording.read(args.routing)
    routes = recording.routes[:, :, : args.top_k]  # [tokens, layers, top_k]
    if routes.shape[1] < args.layers or recording.facts.experts != args.experts:
        raise SystemExit(
            f"{args.routing} has {recording.facts.experts} experts in each of {routes.shape[1]} "
            f"layers; give --experts {recording.facts.experts} and no more --layers than that"
        )
    # Layers from all over the model: neighbours are alike.
    chosen = np.linspace(0, routes.shape[1] - 1, args.layers).round().astype(np.intp)
    batches, tokens = HISTORY + args.batches, args.ranks * args.tokens
    taken = np.take(routes[:, chosen], np.arange(batches * tokens), axis=0, mode="wrap")
    experts = taken.reshape(batches, tokens, args.layers, -1).swapaxes(1, 2).astype(np.int64)
    counts = np.stack(
        [
            [np.bincount(layer.ravel(), minlength=args.experts) for layer in batch]
            for batch in experts
        ]
    )
    return Scenario("recorded", experts, counts / counts.sum(-1, keepdims=True))
