"""Which embedder, history and predictor the settings ask for.

See papers.md A.7.
"""

from __future__ import annotations

import structlog

from planner.config import PlannerSettings
from planner.embedding import Embedder, TokenTableEmbedder
from planner.history import History
from planner.history_file import read_history
from planner.history_store import (
    HistoryIdentity,
    HistoryStore,
    HistoryUnwritableError,
    history_path,
)
from planner.model import ModelFacts
from planner.prediction import (
    ActivationPredictor,
    MeanPredictor,
    SimilarPromptsPredictor,
    UniformPredictor,
)
from planner.prompt_tree import TreeSearch
from planner.regression import RegressionPredictor
from planner.routing_fit import RoutingFit
from planner.search import ExactSearch
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError

__all__ = ["EMBEDDERS", "history_identity", "open_embedder", "open_history", "open_predictor"]

EMBEDDERS = ("token-table", "token-table+minilm")

_log = structlog.get_logger()


def open_embedder(name: str, checkpoint: Checkpoint) -> Embedder:
    """Raises SettingsError if what the embedder needs is not installed."""
    table = TokenTableEmbedder(checkpoint)
    if name == table.name:
        return table
    try:
        from planner.minilm import MiniLm, MiniLmEmbedder
    except ImportError as error:
        raise SettingsError(
            f"The embedder {name} needs {error.name}: pip install 'remoe[planner-minilm]'"
        ) from error
    return MiniLmEmbedder(table, MiniLm.installed(), checkpoint.model_dir)


def history_identity(model: ModelFacts, embedder: Embedder) -> HistoryIdentity:
    return HistoryIdentity(
        model.digest, embedder.name, embedder.dimension, model.layers, model.experts
    )


def open_history(settings: PlannerSettings, model: ModelFacts, embedder: Embedder) -> History:
    """Open the durable history, and take in the shipped one if it has not been.

    Raises SettingsError for a file that is none of this model's. A disk that cannot be written is
    no error: the history says so, is as full as can be, and takes no observations.
    """
    identity = history_identity(model, embedder)
    folder = settings.history_dir
    store = HistoryStore.open(folder and history_path(folder, identity), identity)
    shipped = None if settings.history is None else read_history(settings.history, identity)

    def history(over: HistoryStore) -> History:
        opened = History(over, capacity=settings.history_capacity, moe_layers=model.moe_layers)
        if shipped is not None:
            opened.absorb(shipped, digest=shipped.digest)
        return opened

    try:
        opened = history(store)
    except HistoryUnwritableError as error:
        problem = store.problem or error.message
        if next(store.entries(), None) is None:  # nothing there to lose sight of
            opened = history(HistoryStore(identity, path=store.path, problem=problem))
        else:
            shipped = None
            opened = history(store)
    if opened.store.problem is not None:
        _log.error(
            "history_unwritable",
            path=str(opened.store.path),
            problem=opened.store.problem,
            consequence="observations are refused; planning goes on",
        )
    elif folder is None:
        _log.warning(
            "history_not_durable",
            consequence="observed prompts are forgotten when the planner stops",
            remedy="set REMOE_PLANNER_HISTORY_DIR to a folder",
        )
    if len(opened) == 0:
        _log.warning(
            "history_empty",
            consequence="predictions are uniform until requests have been observed",
            remedy="set REMOE_PLANNER_HISTORY to the model's history.npz",
        )
    else:
        _log.info("history_loaded", entries=len(opened), topics=opened.topic_count())
    return opened


def open_predictor(
    settings: PlannerSettings, history: History, model: ModelFacts
) -> ActivationPredictor:
    """The predictor of the setting's name, fitted if it is one to fit."""
    if settings.predictor == "uniform":
        return UniformPredictor(
            layers=model.layers, experts=model.experts, moe_layers=model.moe_layers
        )
    if settings.predictor == "mean":
        return MeanPredictor(history)
    search = TreeSearch(history) if settings.predictor == "sps" else ExactSearch(history)
    similar = SimilarPromptsPredictor(
        history, search, neighbours=settings.neighbours, temperature=settings.temperature
    )
    if settings.predictor != "regression":
        return similar
    regression = RegressionPredictor(history, similar, neighbours=settings.neighbours)
    if regression.fit_is_due():
        regression.install(RoutingFit.of(*regression.sample()))
    return regression
