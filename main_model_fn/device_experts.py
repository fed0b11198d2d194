"""An expert computed by torch where its weights lie, for any family: gate and up in one matrix."""

from __future__ import annotations

import torch
from torch.nn import functional

from main_model_fn.routes import Batch
from main_model_fn.streaming import ExpertWeights
from remoe.activation import Activation

__all__ = ["DeviceSum", "expert_output"]


def expert_output(
    rows: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) of [rows, hidden]: `gate_up` holds gate's rows, then up's."""
    if weights.slices > 1:
        return _sliced_output(rows, weights, activation)
    gate_up = functional.linear(rows, weights.gate_up, weights.gate_up_bias)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = _activated(gate, up, activation)
    return functional.linear(inner, weights.down, weights.down_bias)


def _sliced_output(
    rows: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """The same, as the sum of slices, which are computed together."""
    gate_up = rows @ weights.gate_up.mT  # [slices, rows, ...]
    if weights.gate_up_bias is not None:
        gate_up += weights.gate_up_bias[:, None]
    gate, up = gate_up.chunk(2, dim=-1)
    output = _activated(gate, up, activation) @ weights.down.mT
    if weights.down_bias is not None:
        output += weights.down_bias[:, None]
    return output.sum(0)


def _activated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.name == "silu":
        return functional.silu(gate) * up
    if activation.name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation.name == "gelu_tanh" else "none"
        return functional.gelu(gate, approximate=approximate) * up
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


class DeviceSum:
    """Adds experts' outputs for a batch, weighted, to float32 `total` [tokens, hidden]."""

    def __init__(self, total: torch.Tensor, batch: Batch, activation: Activation) -> None:
        self._total = total
        self._batch = batch
        self._activation = activation
        self._first, start = dict[int, int](), 0
        for expert, count in batch.counts.items():
            self._first[expert] = start
            start += count

    def add(self, expert: int, weights: ExpertWeights) -> None:
        batch = self._batch
        first = self._first[expert]
        if len(batch.hidden) == 1:  # decoding alone: the weight is a number, and no row is gathered
            output = expert_output(batch.hidden, weights, self._activation)
            slot = int(batch.routes[expert].slots[0])
            self._total.add_(output, alpha=float(batch.gate_weights[0, slot]))
            return
        part = slice(first, first + batch.counts[expert])
        tokens, gates = batch.grouped.tokens[part], batch.grouped.gates[part]
        output = expert_output(batch.hidden.index_select(0, tokens), weights, self._activation)
        # A token chooses an expert once: no two of these rows meet.
        self._total.index_add_(0, tokens, output * gates[:, None])
