"""Initial routers: clusters of prompts, told apart token by token.

k-means over prompts' mean router inputs finds eight kinds of prompt a layer. A token's own input varies far
more within a prompt than prompts differ, so centroids alone route tokens by what they are rather than by
what the prompt is about. The routers here are the linear discriminants of the clusters: the inputs are
whitened by their covariance within prompts first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from models.smollm2_8x135m.upcycled import Upcycled

_SHRINKAGE = 0.1  # towards the covariance's diagonal
_DIRECTIONS = 32  # of the whitened prompt means, those k-means looks at
_MIN_TOKENS = 12  # of a prompt that takes part in the clustering
_BALANCE_STEPS = 200


@dataclass(slots=True)
class RouterInputs:
    """One layer's router inputs over a sample of prompts."""

    means: Tensor  # [prompts, hidden]
    counts: Tensor  # [prompts]
    second: Tensor  # [hidden, hidden] mean of x x^T over tokens
    tokens: Tensor  # [sample, hidden]


def collect_inputs(
    model: Upcycled, batches: Iterable[tuple[Tensor, Tensor, Tensor]], sample_tokens: int
) -> list[RouterInputs]:
    """Run the dense base over (ids, positions, documents) batches and gather each layer's inputs."""
    hidden, layers = model.arch.hidden, model.arch.layers
    means: list[list[Tensor]] = [[] for _ in range(layers)]
    samples: list[list[Tensor]] = [[] for _ in range(layers)]
    counts: list[Tensor] = []
    second = [torch.zeros(hidden, hidden) for _ in range(layers)]
    total = 0
    for ids, positions, documents in batches:
        inputs = model.router_inputs(ids, positions, documents)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        inside = (documents >= 0).flatten()
        label = (rows * (documents.max() + 1) + documents).flatten()[inside]
        _, label, count = torch.unique(label, return_inverse=True, return_counts=True)
        counts.append(count.float())
        total += len(label)
        keep = torch.randperm(len(label), device=ids.device)[: len(label) // 4]
        for layer, x in enumerate(inputs):
            wide = x[inside].float()
            sums = torch.zeros(len(count), hidden, device=x.device).index_add_(0, label, wide)
            means[layer].append(sums / count[:, None])
            second[layer] = second[layer].to(x.device) + wide.T @ wide
            samples[layer].append(wide[keep].to(model.dtype))
    count = torch.cat(counts)
    return [
        RouterInputs(
            torch.cat(means[layer]),
            count,
            second[layer] / total,
            torch.cat(samples[layer])[:sample_tokens].float(),
        )
        for layer in range(layers)
    ]


def discriminant_router(inputs: RouterInputs, experts: int, top_k: int, seed: int) -> Tensor:
    """Return router weights [experts, hidden] that send tokens to their prompt's cluster, with even loads."""
    share = inputs.counts / inputs.counts.sum()
    mean = (share[:, None] * inputs.means).sum(0)
    between = (inputs.means * share[:, None]).T @ inputs.means
    within = inputs.second - between
    within = (1 - _SHRINKAGE) * within + _SHRINKAGE * torch.diag(within.diagonal())
    within += 1e-6 * within.diagonal().mean() * torch.eye(len(within), device=within.device)
    root = torch.linalg.cholesky(within.double())

    def whiten(x: Tensor) -> Tensor:
        white: Tensor = torch.linalg.solve_triangular(root, (x - mean).double().T, upper=False)
        return white.T.float()

    large = inputs.counts >= _MIN_TOKENS
    points = whiten(inputs.means[large])
    _, _, directions = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    directions = directions[:_DIRECTIONS]
    centroids = _k_means(points @ directions.T, experts, seed) @ directions  # whitened
    weights = torch.linalg.solve_triangular(root.T, centroids.double().T, upper=True).T.float()

    # Routers have no bias: the direction nearest to reading 1 on every token stands in for it.
    ridge = 1e-3 * inputs.second.diagonal().mean() * torch.eye(len(mean), device=mean.device)
    constant = torch.linalg.solve(inputs.second + ridge, mean)
    reading = (inputs.tokens @ constant).mean()
    constant /= reading
    scores = (inputs.tokens - mean) @ weights.T  # [sample, experts]
    scale = 1.0 / (scores - scores.mean(1, keepdim=True)).std()
    weights, scores = weights * scale, scores * scale
    bias = _even_loads(scores, (inputs.tokens @ constant)[:, None], top_k)
    router: Tensor = weights + (bias - weights @ mean)[:, None] * constant
    return router


def _even_loads(scores: Tensor, constant: Tensor, top_k: int) -> Tensor:
    """Return the bias of each expert with which top-k choices spread evenly."""
    experts = scores.shape[1]
    bias = torch.zeros(experts, device=scores.device)
    for step in range(_BALANCE_STEPS):
        chosen = (scores + bias * constant).topk(top_k, dim=1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        bias += 2.0 * (1 - step / _BALANCE_STEPS) * (1 / experts - load)
    return bias


def _k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Return centroids [clusters, dims] by Lloyd's algorithm from k-means++ seeds."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    centroids = points[torch.randint(len(points), (1,), generator=generator)[0]][None]
    while len(centroids) < clusters:
        distance = torch.cdist(points, centroids).min(1).values.square().cpu()
        pick = torch.multinomial(distance, 1, generator=generator)[0]
        centroids = torch.cat([centroids, points[pick][None]])
    for _ in range(40):
        nearest = torch.cdist(points, centroids).argmin(1)
        for cluster in range(clusters):
            if (members := points[nearest == cluster]).numel():
                centroids[cluster] = members.mean(0)
    return centroids
