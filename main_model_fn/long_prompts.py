"""Steps in which many rows meet many keys, layer by layer: there torch's matrix products win.

The kernel takes a layer's experts and projections all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn import functional

from main_model_fn.native_attention import MOST_KEYS, MOST_ROWS, Paged, normed_heads
from main_model_fn.native_stack import DecoderLayer, KeysAndValues

__all__ = ["is_long", "run_layers"]

Angles = tuple[torch.Tensor, torch.Tensor]


def is_long(paged: Paged) -> bool:
    """Whether a step is for `run_layers`."""
    most_rows, most_keys = (int(ends.diff().max()) for ends in (paged.row_ends, paged.read_ends))
    return most_rows > MOST_ROWS and most_keys > MOST_KEYS


def run_layers(
    layers: Sequence[DecoderLayer],
    caches: Sequence[KeysAndValues],
    hidden: torch.Tensor,
    angles: Angles,
    paged: Paged,
) -> torch.Tensor:
    """[rows, hidden] through all layers to the same; `angles` are cosines and sines [rows, width]."""
    for layer, cache in zip(layers, caches, strict=True):
        hidden = hidden + _attend(layer, cache, layer.input_norm(hidden), angles, paged)
        normed = layer.experts_norm(hidden)
        index, gates = _routes(layer, normed)
        split = cast("Any", layer.experts).remoe
        hidden = hidden + split.forward(layer.experts, normed, index, gates)
    return hidden


def _attend(
    layer: DecoderLayer, cache: KeysAndValues, hidden: torch.Tensor, angles: Angles, paged: Paged
) -> torch.Tensor:
    attention, (keys, values) = layer.attention, cache
    width, groups = attention.call.width, attention.call.groups
    query, key, value = (linear(hidden) for linear in attention.projections)
    query, key = (
        _rotated((part if norm is None else normed_heads(part, norm, width)), width, angles)
        for part, norm in zip((query, key), attention.norms, strict=True)
    )
    keys[paged.write], values[paged.write] = key, value.view(-1, groups, width)
    rows, read = paged.row_ends.tolist(), paged.read_ends.tolist()
    heads = []
    for number in range(len(rows) - 1):
        places = paged.read[read[number] : read[number + 1]]
        part = query[rows[number] : rows[number + 1]]
        heads.append(_causal(part, keys[places], values[places]))
    output: torch.Tensor = attention.out(torch.cat(heads))
    return output


def _rotated(part: torch.Tensor, width: int, angles: Angles) -> torch.Tensor:
    """[rows, heads x width] to [rows, heads, width], each head's halves turned against each other."""
    heads = part.view(len(part), -1, width)
    cosine, sine = (angle[:, None] for angle in angles)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def _causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One request's rows, the last of its places: [rows, heads, width] to [rows, heads x width]."""
    rows, places = len(query), len(keys)
    each = query.shape[1] // keys.shape[1]
    mask = torch.ones(rows, places, dtype=torch.bool).tril(places - rows)
    keys, values = (one.transpose(0, 1)[None].repeat_interleave(each, 1) for one in (keys, values))
    output = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys, values, attn_mask=mask
    )
    return output[0].transpose(0, 1).reshape(rows, -1)


def _routes(layer: DecoderLayer, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts [rows, top_k] and their weights."""
    logits = functional.linear(normed, layer.router.get_parameter("weight"))
    gates, index = logits.float().softmax(-1).topk(cast("Any", layer.router).top_k, dim=-1)
    if layer.normalized:
        gates = gates / gates.sum(-1, keepdim=True)
    return index, gates.to(layer.gate_dtype)
