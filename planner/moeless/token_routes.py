"""Routes token by token, real or drawn, and what gate copies foretell of them.

See papers.md B.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.gates import GateCopies, top_experts
from remoe.moeless.recording import Recording

__all__ = ["TokenRoutes", "plain_routes", "predicted_routes", "recorded_routes", "synthetic_routes"]

Routes = NDArray[np.uint16]  # [tokens, layers, top_k]


@dataclass(frozen=True, slots=True)
class TokenRoutes:
    """Tokens of some prompts, each prompt's in order: first read, then decoded.

    `predicted` is by distance; its first `distance` layers mean nothing.
    """

    routes: Routes
    predicted: dict[int, Routes]
    prompt: NDArray[np.intp]  # [tokens], counted from 0 without gaps
    decoded: NDArray[np.bool_]  # [tokens]
    experts: int
    topics: list[str]  # [prompts]

    @property
    def layers(self) -> int:
        return int(self.routes.shape[1])

    def only(self, prompts: NDArray[np.bool_]) -> TokenRoutes:
        """The tokens of the chosen prompts, [prompts]."""
        tokens = prompts[self.prompt]
        number = np.cumsum(prompts) - 1
        return TokenRoutes(
            self.routes[tokens],
            {distance: routes[tokens] for distance, routes in self.predicted.items()},
            number[self.prompt[tokens]],
            self.decoded[tokens],
            self.experts,
            [topic for topic, kept in zip(self.topics, prompts, strict=True) if kept],
        )

    def mean_loads(self) -> NDArray[np.float64]:
        """Each expert's share of all routes: [layers, experts]."""
        flat = np.arange(self.layers)[:, None] * self.experts + self.routes
        counts = np.bincount(flat.ravel(), minlength=self.layers * self.experts)
        shares: NDArray[np.float64] = counts.reshape(self.layers, -1) / (counts.sum() / self.layers)
        return shares


def recorded_routes(recording: Recording, predicted: dict[int, Routes]) -> TokenRoutes:
    """What a model really did."""
    facts = recording.facts
    prompt = recording.prompt.astype(np.intp)
    return TokenRoutes(
        recording.routes, predicted, prompt, recording.decoded, facts.experts, facts.labels
    )


def predicted_routes(recording: Recording, copies: GateCopies) -> dict[int, Routes]:
    """What gate copies foretell of a recording, for each of their distances."""
    return {
        d: _apply(recording, d, [copies.weight(layer, d) for layer in recording.facts.layers[d:]])
        for d in copies.facts.distances
    }


def plain_routes(recording: Recording, distances: list[int]) -> dict[int, Routes]:
    """The same of the model's own gates, never trained for it."""
    return {d: _apply(recording, d, list(recording.gates[d:])) for d in distances}


def _apply(recording: Recording, distance: int, gates: list[NDArray[np.float32]]) -> Routes:
    routes = np.zeros_like(recording.routes)
    for source, gate in enumerate(gates):
        logits = recording.hidden(source).astype(np.float32) @ gate.T  # [tokens, experts]
        routes[:, source + distance] = top_experts(logits, recording.facts.top_k)
    return routes


def synthetic_routes(
    *,
    layers: int,
    experts: int,
    top_k: int,
    zipf: float,
    topical: float = 0.0,
    accuracy: float = 0.85,
    prompts: int = 200,
    tokens_per_prompt: int = 64,
    seed: int = 0,
) -> TokenRoutes:
    """Skewed routing: expert popularity falls as rank^-zipf, in another order in each layer.

    `topical` mixes in a prompt's own Dirichlet(1) popularity, 0 to 1. A predicted route is the
    true one with chance `accuracy`, else drawn anew. Half of a prompt's tokens are read, half
    decoded.
    """
    random = np.random.default_rng(seed)
    shape = (prompts, tokens_per_prompt, layers, experts)
    ranks = np.arange(1.0, experts + 1) ** -zipf
    popular = np.stack([random.permutation(ranks / ranks.sum()) for _ in range(layers)])
    own = random.dirichlet(np.ones(experts), (prompts, layers))
    chances = (1 - topical) * popular + topical * own  # [prompts, layers, experts]
    log_chances = np.log(np.maximum(chances, 1e-12))[:, None]

    def draw() -> Routes:
        # The k largest of log p + Gumbel noise are k draws without replacement.
        noisy = log_chances + random.gumbel(size=shape)
        flat = noisy.reshape(-1, experts).astype(np.float32)
        chosen = top_experts(flat, top_k).astype(np.uint16)
        return chosen.reshape(prompts * tokens_per_prompt, layers, top_k)

    routes, other = draw(), draw()
    right = random.random((len(routes), layers, 1)) < accuracy
    predicted = np.where(right, routes, other).astype(np.uint16)
    read = np.arange(tokens_per_prompt) < tokens_per_prompt // 2
    return TokenRoutes(
        routes,
        {1: predicted},
        np.repeat(np.arange(prompts), tokens_per_prompt),
        np.tile(~read, prompts),
        experts,
        ["synthetic"] * prompts,
    )
