"""The terms of the training loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_TOKENS = 4096
# Width, in units of the logits, of the soft step that stands for "is among the chosen experts".
_STEP_WIDTH = 0.3


def _cross_entropy_sum(
    hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    logits = F.linear(hidden, embedding).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def _divergence_sum(hidden: Tensor, teacher: Tensor, embedding: Tensor, weights: Tensor) -> Tensor:
    ours = F.log_softmax(F.linear(hidden, embedding).float(), dim=-1)
    base = F.log_softmax(F.linear(teacher, embedding).float(), dim=-1)
    return ((base.exp() * (base - ours)).sum(-1) * weights).sum()


class TokenLosses:
    """Weighted means over tokens of the cross entropy and of the divergence from the base."""

    def __init__(self, *, compiled: bool) -> None:
        self._cross_entropy = (
            torch.compile(_cross_entropy_sum, dynamic=False) if compiled else _cross_entropy_sum
        )
        self._divergence = (
            torch.compile(_divergence_sum, dynamic=False) if compiled else _divergence_sum
        )

    def cross_entropy(
        self, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """Hidden [tokens, hidden], targets and weights [tokens] -> mean nats a token."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in _chunks(len(hidden)):
            total = total + checkpoint(
                self._cross_entropy,
                hidden[part],
                embedding,
                targets[part],
                weights[part],
                use_reentrant=False,
            )
        return total / weights.sum().clamp(min=1)

    def divergence(
        self, hidden: Tensor, teacher: Tensor, embedding: Tensor, weights: Tensor
    ) -> Tensor:
        """KL(base || ours): both hidden states [tokens, hidden], weights [tokens] -> mean nats a token."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in _chunks(len(hidden)):
            total = total + checkpoint(
                self._divergence,
                hidden[part],
                teacher[part],
                embedding,
                weights[part],
                use_reentrant=False,
            )
        return total / weights.sum().clamp(min=1)


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, start + _CHUNK_TOKENS) for start in range(0, tokens, _CHUNK_TOKENS)]


def load_balance(logits: Tensor, top_k: int) -> Tensor:
    """Switch's loss, 1 when loads are even: logits [layers, tokens, experts] -> mean over layers."""
    experts = logits.shape[-1]
    chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, experts).float().sum(2) / top_k
    return experts * (chosen.mean(1) * logits.softmax(-1).mean(1)).sum(-1).mean()


def topicality(logits: Tensor, label: Tensor, documents: int, top_k: int) -> Tensor:
    """Return the mutual information, in nats, between a token's document and the experts it goes to.

    High when every document keeps to few experts and all experts are used. logits [layers, tokens,
    experts]; `label` [tokens] numbers the documents. The choice of experts is made soft by a step between
    the k-th and the next logit.
    """
    best = logits.topk(top_k + 1, dim=-1).values
    middle = (best[..., top_k - 1] + best[..., top_k]).unsqueeze(-1) / 2
    chosen = torch.sigmoid((logits - middle.detach()) / _STEP_WIDTH)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    sums = chosen.new_zeros(len(logits), documents, logits.shape[-1]).index_add(1, label, chosen)
    counts = torch.bincount(label, minlength=documents).to(chosen.dtype)
    profiles = sums / counts.clamp(min=1)[:, None]  # [layers, documents, experts]
    # A long document counts as a short paragraph's worth, not by its length.
    weights = counts.clamp(max=64)
    weights = weights / weights.sum()
    overall = (weights[:, None] * profiles).sum(1)
    return (_entropy(overall) - (weights * _entropy(profiles)).sum(-1)).mean()


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp(min=1e-9).log()).sum(-1)
