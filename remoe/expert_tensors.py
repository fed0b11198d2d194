"""One expert's weights as views into a checkpoint's tensors, for every layout of the family table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from remoe.experts import ExpertId
from remoe.families import Layout
from remoe.mapped import MappedTensor

__all__ = ["ExpertTensors", "view_expert"]


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The weights of one expert: `gate` and `up` [intermediate, hidden], `down` transposed.

    They may be strided views into tensors that hold other experts too. Biases are None or vectors.
    """

    gate: MappedTensor
    up: MappedTensor
    down: MappedTensor
    gate_bias: MappedTensor | None = None
    up_bias: MappedTensor | None = None
    down_bias: MappedTensor | None = None

    def all(self) -> list[MappedTensor]:
        """Its matrices, and its biases if it has them."""
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        return [self.gate, self.up, self.down, *(bias for bias in biases if bias is not None)]


def view_expert(
    layout: Layout, expert: ExpertId, tensor: Callable[[str], MappedTensor]
) -> ExpertTensors:
    """Find an expert in the tensors that `tensor` gives by name; nothing is read or copied."""

    def part(template: str) -> MappedTensor:
        found = tensor(template.format(layer=expert.layer, expert=expert.index))
        values = found.values[expert.index] if layout.stacked else found.values
        return found.view(values.T if layout.transposed else values)

    def gate_and_up(suffix: str) -> tuple[MappedTensor, MappedTensor]:
        if not layout.fused:
            return part(layout.gate + suffix), part(layout.up + suffix)
        both = part(layout.gate + suffix)  # [2 x intermediate, hidden], or a bias
        inner = len(both.values) // 2
        first, second = (
            (slice(0, None, 2), slice(1, None, 2))
            if layout.interleaved
            else (slice(inner), slice(inner, None))
        )
        return (
            both.view(both.values[first]),
            both.view(both.values[second]),
        )

    gate, up = gate_and_up("")
    if layout.bias is None:
        return ExpertTensors(gate, up, part(layout.down))
    return ExpertTensors(
        gate, up, part(layout.down), *gate_and_up(layout.bias), part(layout.down + layout.bias)
    )
