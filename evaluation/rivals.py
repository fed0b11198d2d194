"""Every way to predict a prompt's activations, the paper's and ours, and how far each is off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from evaluation.prompts import DECODE_TOKENS, KnownPrompts
from planner.baselines import FatePredictor, FixedTreeSearch, routers_of, var_ed, var_pam
from planner.divergence import js_divergence
from planner.history import History
from planner.history_store import Entry, HistoryIdentity, HistoryStore
from planner.phases import PhaseProfiles
from planner.prediction import (
    ActivationPredictor,
    MeanPredictor,
    Prediction,
    Prompt,
    SimilarPromptsPredictor,
    UniformPredictor,
    phase_profiles,
)
from planner.prompt_tree import ALPHA, PromptTree
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from planner.search import ExactSearch
from planner.selection import remote_mask, select_remote
from remoe.errors import CheckpointError
from remoe.experts import ActivationProfile

__all__ = [
    "Accuracy",
    "accuracy_of",
    "fitted",
    "history_of",
    "prompts_of",
    "rivals",
    "truths_of",
]

TEMPERATURES = (1, 0.3, 0.1, 0.03, 0.02, 0.01, 0.005)


class RegressionAlone:
    """The default predictor without its correction by neighbours."""

    def __init__(self, fit: RoutingFit, shape: tuple[int, ...]) -> None:
        self._fit = fit
        self._shape = shape

    def predict(self, prompt: Prompt) -> Prediction:
        projected = self._fit.project(prompt.vector[None])
        flat = self._fit.regress(projected, np.array([len(prompt.token_ids)]))[0]
        return Prediction(phase_profiles(np.maximum(flat, 1e-4).reshape(self._shape)))


class PrefillForBoth:
    """As printed in the paper: the predicted prefill serves decoding too (A.7.4)."""

    def __init__(self, inner: ActivationPredictor) -> None:
        self._inner = inner

    def predict(self, prompt: Prompt) -> Prediction:
        prefill = self._inner.predict(prompt).profiles.prefill
        return Prediction(PhaseProfiles(prefill, prefill))


def history_of(
    entries: Iterable[Entry], identity: HistoryIdentity, path: Path | None = None
) -> History:
    """A history of entries as they are, without comparing each with all."""
    store = HistoryStore.open(path, identity)
    with store.batch(imported="evaluation"):
        store.commit(entries)
    count = sum(1 for _ in store.entries())
    return History(store, capacity=count)


def fitted(history: History, fallback: ActivationPredictor) -> RegressionPredictor:
    """The default predictor, learned from this history."""
    predictor = RegressionPredictor(history, fallback)
    predictor.install(RoutingFit.of(*predictor.sample()))
    return predictor


def fitted_temperature(history: History) -> float:
    """The softmax temperature that best predicts each entry from the others."""
    profiles = history.profiles(range(len(history)))  # [n, 2, layers, experts]
    similarity = history.vectors @ history.vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :ALPHA]
    scores = np.take_along_axis(similarity, nearest, axis=1)
    results = {}
    for temperature in TEMPERATURES:
        weights = np.exp((scores - scores[:, :1]) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        total = 0.0
        for row in range(0, len(history), 5):
            guess = np.tensordot(weights[row], profiles[nearest[row]], axes=1)
            total += float(js_divergence(guess, profiles[row]).mean())
        results[temperature] = total
    return min(results, key=lambda temperature: results[temperature])


def rivals(known: KnownPrompts, history: History) -> dict[str, ActivationPredictor]:
    """Predictors by name, the paper's first. Fate needs the prompts' tokens, and routers of a kind
    that is known; where either is missing it is left out."""
    model = known.model

    def similar(
        search: ExactSearch | FixedTreeSearch, temperature: float = 1
    ) -> ActivationPredictor:
        return SimilarPromptsPredictor(history, search, neighbours=ALPHA, temperature=temperature)

    exact = similar(ExactSearch(history))
    grown = PromptTree(history.vectors)
    tree = similar(FixedTreeSearch(history.vectors, grown))
    printed = similar(FixedTreeSearch(history.vectors, grown, leaves=1))
    warm = fitted_temperature(history)
    regression = fitted(history, exact)
    shape = (2, model.layers, model.experts)
    found: dict[str, ActivationPredictor] = {
        "EF: uniform": UniformPredictor(
            layers=model.layers, experts=model.experts, moe_layers=model.moe_layers
        ),
        "DOP: the history's mean": MeanPredictor(history),
    }
    if known.tokens is not None:
        with contextlib.suppress(CheckpointError):
            found["Fate: routers asked about embeddings"] = FatePredictor(
                known.checkpoint,
                routers_of(known.checkpoint),
                layers=model.layers,
                top_k=model.top_k,
            )
    return found | {
        "VarED": similar(var_ed(history)),
        "VarPAM": similar(var_pam(history)),
        "SPS: the tree": tree,
        "SPS as printed: one leaf": printed,
        "SPS as printed: one leaf, prefill serves decoding": PrefillForBoth(printed),
        "BF: exact search": exact,
        f"BF, temperature fitted ({warm:g})": similar(ExactSearch(history), warm),
        "regression alone": RegressionAlone(RoutingFit.of(*regression.sample()), shape),
        "regression and neighbours (default)": regression,
    }


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Divergences in nats, means over layers, then prompts; `known` and `absent` are of both phases,
    for prompts of sets that the history has or has not. `remote` is the share of the routes that hit
    remote experts when half of them are, by this prediction."""

    prefill: float
    decode: float
    both: float
    known: float | None
    absent: float | None
    remote: float


def prompts_of(known: KnownPrompts) -> list[Prompt]:
    """The held-out prompts; where only their lengths are known, the tokens are all the same."""
    tokens = known.tokens or [[0] * entry.n_tokens for entry in known.held_out]
    return [Prompt(ids, entry.vector) for ids, entry in zip(tokens, known.held_out, strict=True)]


def truths_of(entries: list[Entry]) -> list[PhaseProfiles]:
    return [
        PhaseProfiles(ActivationProfile(entry.prefill), ActivationProfile(entry.decode))
        for entry in entries
    ]


def accuracy_of(
    predictor: ActivationPredictor | None,
    prompts: list[Prompt],
    truths: list[PhaseProfiles],
    absent: NDArray[np.bool_],
) -> Accuracy:
    """Without a predictor the truth predicts itself: what an oracle would reach."""
    prefill, decode, remote = (np.empty(len(prompts)) for _ in range(3))
    for row, (prompt, truth) in enumerate(zip(prompts, truths, strict=True)):
        guess = truth if predictor is None else predictor.predict(prompt).profiles
        prefill[row] = js_divergence(guess.prefill.shares, truth.prefill.shares).mean()
        decode[row] = js_divergence(guess.decode.shares, truth.decode.shares).mean()
        remote[row] = remote_share(guess, truth, len(prompt.token_ids))
    both = (prefill + decode) / 2
    return Accuracy(
        prefill=float(prefill.mean()),
        decode=float(decode.mean()),
        both=float(both.mean()),
        known=float(both[~absent].mean()) if (~absent).any() else None,
        absent=float(both[absent].mean()) if absent.any() else None,
        remote=float(remote.mean()),
    )


def remote_share(profiles: PhaseProfiles, truth: PhaseProfiles, n_tokens: int) -> float:
    """Share of the routes that hit the half of the experts that is remote by these profiles."""
    partition = select_remote(profiles.mixed(n_tokens, DECODE_TOKENS), 0.5)
    routes = truth.expected_routes(n_tokens, DECODE_TOKENS, top_k=1)
    return float((routes * remote_mask(partition)).sum() / routes.sum())
