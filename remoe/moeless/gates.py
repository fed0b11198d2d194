"""The Load Predictor's gate copies: a layer's load, from the hidden states some layers before (B.3).

Two files beside a model: the gates, and what is known of them. Where a plain copy of the gate was
accurate enough it is kept as it is; elsewhere there is a fine-tuned one of the same size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.errors import CheckpointError
from remoe.mapped import Shard

__all__ = ["GATES_FOLDER", "GateCopies", "GateQuality", "GatesFacts", "top_experts"]

GATES_FOLDER = "moeless"  # in the model's folder, whose own *.safetensors are the checkpoint's
GATES_FILE, _FACTS_FILE = "gates.safetensors", "gates.json"


class GateQuality(msgspec.Struct, frozen=True):
    """How well held-out routing of decoder layer `layer` is predicted `distance` layers before.

    Overlap is |predicted top-k ∩ true top-k| / k, the mean over tokens; the correlations are
    Pearson's, of predicted and true loads of batches: of whole prompts, and of one decode step.
    """

    layer: int
    distance: int
    tuned: bool
    plain_overlap: float
    overlap: float
    plain_pearson: float
    pearson: float
    plain_step_pearson: float
    step_pearson: float


class GatesFacts(msgspec.Struct, frozen=True):
    """What gates.json says; `layers` are the decoder layers that have experts."""

    model_digest: str
    file_digest: str
    layers: list[int]
    experts: int
    top_k: int
    hidden: int
    distances: list[int]
    threshold: float
    train_tokens: int
    test_tokens: int
    quality: list[GateQuality]


def top_experts(logits: NDArray[np.float32], top_k: int) -> NDArray[np.intp]:
    """The k largest of each row, in no order: [tokens, experts] to [tokens, k]."""
    return np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]


class GateCopies:
    """Gate copies for every layer and distance, checked against their digest."""

    def __init__(self, facts: GatesFacts, weights: dict[int, NDArray[np.float32]]) -> None:
        self.facts = facts
        self._weights = weights  # by distance: [layers - distance, experts, hidden]
        self._place = {layer: place for place, layer in enumerate(facts.layers)}

    @classmethod
    def read(cls, folder: Path, *, model_digest: str) -> GateCopies:
        """Raises CheckpointError for missing or damaged files, or for those of another model."""
        again = "make them again with `remoe profile gates`"
        try:
            facts = msgspec.json.decode((folder / _FACTS_FILE).read_bytes(), type=GatesFacts)
            digest = _digest(folder / GATES_FILE)
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{folder} holds no gate copies ({error}); {again}") from error
        if digest != facts.file_digest:
            raise CheckpointError(f"{folder / GATES_FILE} is not what {_FACTS_FILE} says; {again}")
        if facts.model_digest != model_digest:
            raise CheckpointError(
                f"the gate copies in {folder} are of model {facts.model_digest}, this one is "
                f"{model_digest}; {again}"
            )
        shard = Shard(folder / GATES_FILE)
        return cls(
            facts,
            {d: shard.tensor(f"distance-{d}").to_float32() for d in facts.distances},
        )

    def weight(self, layer: int, distance: int) -> NDArray[np.float32]:
        """The gate that foretells decoder layer `layer` from `distance` layers with experts before.

        [experts, hidden]. Raises KeyError where there is none: in the first layers, and beyond the
        distances trained.
        """
        place = self._place[layer] - distance
        if place < 0:
            raise KeyError(layer)
        weight: NDArray[np.float32] = self._weights[distance][place]
        return weight

    def routes(
        self, layer: int, hidden: NDArray[np.floating], *, distance: int = 1
    ) -> NDArray[np.intp]:
        """The experts that `layer` is expected to choose: [tokens, hidden] to [tokens, top_k].

        `hidden` is what the gate `distance` layers before is given.
        """
        logits = hidden.astype(np.float32) @ self.weight(layer, distance).T
        return top_experts(logits, self.facts.top_k)

    def loads(
        self, layer: int, hidden: NDArray[np.floating], *, distance: int = 1
    ) -> NDArray[np.float64]:
        """How many tokens each expert of `layer` is expected to get: [experts]."""
        routes = self.routes(layer, hidden, distance=distance)
        return np.bincount(routes.ravel(), minlength=self.facts.experts).astype(np.float64)

    def write_facts(self, folder: Path) -> None:
        """Write gates.json beside gates.safetensors, which is there already, with its digest."""
        facts = msgspec.structs.replace(self.facts, file_digest=_digest(folder / GATES_FILE))
        text = msgspec.json.format(msgspec.json.encode(facts), indent=1)
        (folder / _FACTS_FILE).write_bytes(text)


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
