"""Per-request sampling inside transformers' continuous batching.

The engine samples a whole batch alike and takes an argmax when it does not sample. So sampling is
done here as an argmax too: each row gets its own request's penalties, filters and Gumbel noise
from a generator seeded by the request and the position, and argmax(logits + Gumbel) is a draw
from softmax(logits). A seeded draw is thus the same whatever shares the batch.
"""

from __future__ import annotations

import torch

from remoe.generation import SamplingParams

__all__ = ["perturb"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so positions of one seed never coincide


def perturb(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    seed: int,
    generated: list[int],
) -> torch.Tensor:
    """Scores [vocab] whose argmax is the next token; `logits` is float32 [vocab].

    Greedy (temperature 0) adds no noise. The order is bias and penalties, temperature, then top-k,
    top-p and min-p on what is left.
    """
    scores = logits
    if generated and params.repetition_penalty != 1:
        ids = torch.tensor(generated, device=scores.device)
        seen = scores[ids]
        penalty = params.repetition_penalty
        scores = scores.scatter(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    if params.logit_bias:
        scores = scores.clone()
        ids = torch.tensor(list(params.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), device=scores.device)
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.unique(
            torch.tensor(generated, device=scores.device), return_counts=True
        )
        penalty = params.presence_penalty + params.frequency_penalty * counts
        scores = scores.index_add(0, ids, -penalty.to(scores.dtype))
    if params.temperature == 0:
        return scores
    scores = _filter(scores / params.temperature, params)
    generator = torch.Generator().manual_seed((seed + len(generated) * _SEED_STRIDE) % 2**63)
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
    return scores + gumbel.to(scores.device, scores.dtype)


def _filter(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Set the scores outside top-k, top-p and min-p to minus infinity."""
    if 0 < params.top_k < len(scores):
        threshold = torch.topk(scores, params.top_k).values[-1]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if params.top_p < 1:
        ordered, order = torch.sort(scores, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token stays while the mass before it is below top_p; the first always does.
        dropped = before >= params.top_p
        dropped[0] = False
        scores = scores.masked_fill(
            torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf
        )
    if params.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return scores
