"""How each model family names its expert tensors in published checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from remoe.errors import CheckpointError
from remoe.experts import ExpertId

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """One row of the table: tensor names with `{layer}` and `{expert}`, and where sizes are kept.

    `gate` and `up` are [intermediate, hidden], `down` is [hidden, intermediate]. `renames` turn a
    checkpoint's names into the module names of transformers 5, for all other tensors.
    """

    model_type: str
    gate: str
    up: str
    down: str
    renames: tuple[tuple[str, str], ...]
    experts_key: str
    top_k_key: str
    intermediate_key: str

    @cached_property
    def _expert_pattern(self) -> re.Pattern[str]:
        alternatives = "|".join(
            re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
            for name in (self.gate, self.up, self.down)
        )
        return re.compile(alternatives)

    def expert_names(self, expert: ExpertId) -> tuple[str, str, str]:
        """The gate, up and down tensors of one expert."""
        gate, up, down = (
            name.format(layer=expert.layer, expert=expert.index)
            for name in (self.gate, self.up, self.down)
        )
        return gate, up, down

    def is_expert(self, tensor_name: str) -> bool:
        return self._expert_pattern.fullmatch(tensor_name) is not None

    def module_name(self, tensor_name: str) -> str:
        """The name a non-expert tensor has in the transformers module."""
        for old, new in self.renames:
            tensor_name = tensor_name.replace(old, new)
        return tensor_name


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",
            gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            renames=((".block_sparse_moe.", ".mlp."),),
            experts_key="num_local_experts",
            top_k_key="num_experts_per_tok",
            intermediate_key="intermediate_size",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """Look up a family; raises CheckpointError that lists the supported ones."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise CheckpointError(
            f"models of type {model_type!r} are not supported yet; supported: "
            f"{', '.join(sorted(FAMILIES))}. A family is one row of remoe/families.py."
        ) from None
