"""Log-probabilities of tokens: the model's own, from raw logits, as OpenAI's are.

Natural logarithms, and the alternatives' likeliest first. A prompt's rows are many and are done
where they are computed; the one row of a generated token is done in numpy (sampling.py says why).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from remoe.generation import TokenLogprob, TopLogprob

__all__ = ["token_logprob", "token_logprobs"]


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The token that came after `logits`, float32 [vocab], and `top` alternatives."""
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    best = np.argpartition(logits, -top)[len(logits) - top :] if top else np.empty(0, np.intp)
    best = best[np.argsort(-logits[best], kind="stable")]
    return _entry(
        token, float(logits[token]) - total, best.tolist(), (logits[best] - total).tolist()
    )


def token_logprobs(logits: torch.Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
    """The same for each row of `logits`, float32 [rows, vocab], and the token that came there."""
    total = logits.logsumexp(-1, keepdim=True)  # [rows, 1]
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    came = (logits.gather(1, ids) - total)[:, 0].tolist()
    best = logits.topk(top, dim=-1)
    values, indices = (best.values - total).tolist(), best.indices.tolist()
    return [_entry(*entry) for entry in zip(tokens, came, indices, values, strict=True)]


def _entry(
    token: int, logprob: float, alternatives: list[int], logprobs: list[float]
) -> TokenLogprob:
    top = [TopLogprob(token=t, logprob=p) for t, p in zip(alternatives, logprobs, strict=True)]
    return TokenLogprob(token=token, logprob=logprob, top=top)
