"""The predictors that the paper compares SPS with (A.13) and that only comparisons use.

EF and DOP are `UniformPredictor` and `MeanPredictor`, BF is SPS with `ExactSearch`; here are
VarPAM, VarED and Fate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.clustering import pam
from planner.embedding import EmbeddingTable
from planner.history import History
from planner.phases import PhaseProfiles, normalise_rows
from planner.prediction import Prediction, Prompt
from planner.prompt_tree import LEAVES, PromptTree
from planner.search import best_of
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import ActivationProfile

__all__ = ["FatePredictor", "FixedTreeSearch", "Router", "routers_of", "var_ed", "var_pam"]


@dataclass(frozen=True)
class FixedTreeSearch:
    """Search in a given tree over a history that no longer changes."""

    vectors: NDArray[np.float32]
    tree: PromptTree
    leaves: int = LEAVES

    def nearest(
        self, vector: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        rows = self.tree.candidates(vector, count, leaves=self.leaves)
        return best_of(self.vectors, rows, vector, count)


def var_pam(history: History) -> FixedTreeSearch:
    """VarPAM: nodes are split by PAM instead of the paper's own k-medoids."""
    return FixedTreeSearch(history.vectors, PromptTree(history.vectors, clustering=pam))


def var_ed(history: History) -> FixedTreeSearch:
    """VarED: prompts are clustered by the Euclidean distance of their activation profiles.

    A prompt that is searched for has no profile yet, so that it descends by similarity to the
    medoids, which are prompts.
    """
    profiles = history.profiles(range(len(history)))[:, 0].reshape(len(history), -1)
    return FixedTreeSearch(history.vectors, PromptTree(history.vectors, points=profiles))


@dataclass(frozen=True)
class Router:
    """What a layer applies to its hidden states: weights behind a root-mean-square norm's scale."""

    layer: int
    weights: NDArray[np.float32]  # [experts, hidden]
    scale: NDArray[np.float32]  # [hidden]


def routers_of(checkpoint: Checkpoint) -> list[Router]:
    """Read the routers; raises CheckpointError for a family that names them otherwise."""
    routers = []
    for layer in checkpoint.moe_layers:
        prefix = f"model.layers.{layer}."
        names = [name for name in checkpoint.non_expert_names if name.startswith(prefix)]
        gates = [name for name in names if name.endswith((".gate.weight", ".router.weight"))]
        norm = f"{prefix}post_attention_layernorm.weight"
        if len(gates) != 1 or norm not in names:
            raise CheckpointError(f"layer {layer} has no router and norm of known names")
        weights, scale = checkpoint.tensor(gates[0]), checkpoint.tensor(norm)
        routers.append(Router(layer, weights.to_float32(), scale.to_float32()))
    return routers


class FatePredictor:
    """Fate, as the paper adapts it: every layer's router is asked about the token embeddings.

    Fate itself asks the next layer's router about the previous layer's input, token by token. Ahead
    of the run only the embeddings are there. Decoding is predicted as reading is.
    """

    def __init__(
        self, table: EmbeddingTable, routers: list[Router], *, layers: int, top_k: int
    ) -> None:
        self._table = table
        self._routers = routers
        self._layers = layers
        self._top_k = top_k

    def predict(self, prompt: Prompt) -> Prediction:
        rows = self._table.embedding_rows(prompt.token_ids)  # [tokens, hidden]
        normed = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-6)
        counts = np.zeros((self._layers, len(self._routers[0].weights)))
        for router in self._routers:
            logits = (normed * router.scale) @ router.weights.T  # [tokens, experts]
            chosen = np.argpartition(-logits, self._top_k - 1, axis=1)[:, : self._top_k]
            counts[router.layer] = np.bincount(chosen.ravel(), minlength=counts.shape[1])
        profile = ActivationProfile(normalise_rows(counts))
        return Prediction(PhaseProfiles(profile, profile))
