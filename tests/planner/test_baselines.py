from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planner.baselines import FatePredictor, FixedTreeSearch, Router, routers_of, var_ed, var_pam
from planner.history import History
from planner.prediction import Prompt, UniformPredictor
from planner.prompt_tree import ALPHA
from planner.search import ExactSearch
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from tests.planner.test_embedding import ArrayTable
from tests.planner.test_regression import Routing
from tests.planner.worlds import World


def test_fate_asks_every_router_about_the_tokens_themselves() -> None:
    table = ArrayTable(np.array([[1, 0], [0, 1], [3, 0]], np.float32))
    keeps = Router(0, np.eye(2, dtype=np.float32), np.ones(2, np.float32))
    swaps = Router(2, np.eye(2, dtype=np.float32)[::-1], np.ones(2, np.float32))
    fate = FatePredictor(table, [keeps, swaps], layers=3, top_k=1)
    profiles = fate.predict(Prompt([0, 1, 2, 2], np.zeros(2, np.float32))).profiles
    assert profiles.prefill.shares.tolist() == [[0.75, 0.25], [0, 0], [0.25, 0.75]]
    assert profiles.decode is profiles.prefill


def test_fate_s_norm_scale_counts() -> None:
    table = ArrayTable(np.array([[1, 0.9]], np.float32))
    router = Router(0, np.eye(2, dtype=np.float32), np.array([1, 2], np.float32))
    fate = FatePredictor(table, [router], layers=1, top_k=1)
    shares = fate.predict(Prompt([0], np.zeros(2, np.float32))).profiles.prefill.shares
    assert shares.tolist() == [[0, 1]]


def test_routers_are_read_from_a_checkpoint(tiny_model_dir: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    routers = routers_of(checkpoint)
    assert [router.layer for router in routers] == list(checkpoint.moe_layers)
    for router in routers:
        assert router.weights.shape == (checkpoint.experts, checkpoint.hidden_size)
        assert router.scale.shape == (checkpoint.hidden_size,)


def test_a_checkpoint_without_routers_is_refused(world: World) -> None:
    with pytest.raises(CheckpointError, match="no router"):
        routers_of(Checkpoint.open(world.folder / "model"))


@pytest.mark.parametrize("make", [var_pam, var_ed])
def test_other_trees_find_some_of_the_nearest(
    make: Callable[[History], FixedTreeSearch],
) -> None:
    history = Routing().history(400)
    search, exact = make(history), ExactSearch(history)
    hits = 0
    for row in range(0, 400, 20):
        vector = history.vectors[row]
        rows, similarities = search.nearest(vector, ALPHA)
        assert len(rows) == ALPHA
        assert (np.diff(similarities) <= 0).all()
        hits += len(set(rows.tolist()) & set(exact.nearest(vector, ALPHA)[0].tolist()))
    assert hits > 20 * ALPHA / 4


def test_uniform_leaves_dense_layers_alone() -> None:
    predictor = UniformPredictor(layers=3, experts=4, moe_layers=(0, 2))
    shares = predictor.predict(Prompt([1], np.zeros(2, np.float32))).profiles.decode.shares
    assert shares.tolist() == [[0.25] * 4, [0] * 4, [0.25] * 4]
