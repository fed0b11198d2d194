"""Decodes a batch of prompts together as each would be decoded alone.

A served request is sampled as the model's `generation_config.json` recommends unless it says
otherwise, so this does the same: what a model writes decides which experts it uses, and a small
model decoded greedily loops, which real answers do less. The draws are seeded by the prompt, so
they are the same in any batch and at any time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

__all__ = ["decode_batch", "pad_right"]


def pad_right(encoded: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both [sequences, longest].

    Padding is to the right: a causal model's real tokens never see it, and it always sees them, so
    that no row of the attention is empty.
    """
    ids = torch.zeros(len(encoded), max(map(len, encoded)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)


def decode_batch(
    model: PreTrainedModel, encoded: Sequence[Sequence[int]], steps: int
) -> Iterator[Tensor]:
    """Yield before each pass over the model which of its tokens are real, [sequences, length].

    First the prefill, then up to `steps` steps of one token a sequence. A sequence that has drawn
    an end token, which is not decoded, runs along without real tokens.
    """
    config: GenerationConfig = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids, mask = pad_right(encoded, model.device)
    lengths = mask.sum(1)  # [sequences]
    yield mask
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=steps > 0)
    if steps == 0:
        return
    last = out.last_hidden_state[torch.arange(len(ids), device=ids.device), lengths - 1]
    chances = torch.tensor(np.stack([_chances(tokens, steps) for tokens in encoded]))
    chances = chances.to(ids.device, torch.float32)  # [sequences, steps]
    end_ids = torch.tensor([end for end in ends if end is not None], device=ids.device)
    active = torch.ones(len(ids), 1, dtype=torch.long, device=ids.device)
    seen: Tensor | None = None  # [sequences, vocab]: what has been generated
    for step in range(steps):
        logits = model.get_output_embeddings()(last).float()  # [sequences, vocab]
        seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
        token = _choose(logits, seen, chances[:, step : step + 1], config)  # [sequences, 1]
        seen.scatter_(1, token, value=True)
        active = active * ~torch.isin(token, end_ids)
        if not active.any():
            return
        # The cache holds prompt, padding, and what was generated after both.
        mask = torch.cat([mask, active], dim=1)
        yield active
        out = model.base_model(
            input_ids=token,
            attention_mask=mask,
            position_ids=(lengths + step)[:, None],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        last = out.last_hidden_state[:, -1]


def _chances(tokens: Sequence[int], steps: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return a number in [0, 1) for each step, the same whenever the prompt is the same."""
    seed = zlib.crc32(np.asarray(tokens, dtype="<i4").tobytes())
    return np.random.default_rng(seed).random(steps)


def _choose(logits: Tensor, seen: Tensor, chance: Tensor, config: GenerationConfig) -> Tensor:
    """Return one token of each row, [sequences, 1]: repetition penalty, temperature, top-p, min-p."""
    penalty = config.repetition_penalty or 1.0
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    scores = torch.where(seen, penalised, logits)
    if not config.do_sample:
        return scores.argmax(-1, keepdim=True)
    ordered, order = (scores / (config.temperature or 1.0)).sort(
        dim=-1, descending=True, stable=True
    )
    shares = ordered.softmax(-1)
    upto = shares.cumsum(-1)
    # A token stays while the mass before it is below top_p; the first always does.
    likely = shares >= (config.min_p or 0.0) * shares[:, :1]
    kept = torch.where(likely & (upto - shares < (config.top_p or 1.0)), shares, 0).cumsum(-1)
    place = (kept <= chance * kept[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, place.clamp(max=logits.shape[-1] - 1))
