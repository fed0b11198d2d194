from __future__ import annotations

import numpy as np
import pytest

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.build import default_inputs
from models.smollm2_8x135m.delta import Delta


def test_delta_is_within_its_budget_and_complete() -> None:
    assert sum(path.stat().st_size for path in recipe.DELTA_FILES) <= recipe.DELTA_BUDGET_BYTES
    delta, arch = Delta(recipe.DELTA_FILES), recipe.ARCHITECTURE
    shapes = recipe.delta_shapes(arch, delta.rank())
    for layer in range(arch.layers):
        for part, shape in shapes.items():
            values = delta.tensor(layer, part)
            assert values.shape == shape
            assert np.isfinite(values).all()
            assert values.any()


@pytest.fixture(scope="module")
def history() -> dict[str, np.ndarray]:
    path = recipe.HERE / "history.npz"
    assert path.stat().st_size <= 4_000_000
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_history_was_made_by_this_very_model(history: dict[str, np.ndarray]) -> None:
    assert str(history["model_digest"]) == default_inputs().digest()


def test_history_arrays_agree(history: dict[str, np.ndarray]) -> None:
    arch, count = recipe.ARCHITECTURE, len(history["n_tokens"])
    assert count >= 1_800
    assert history["vectors"].shape == (count, arch.hidden)
    assert history["profiles"].shape == (count, arch.layers, arch.experts)
    assert history["decode_profiles"].shape == history["profiles"].shape
    assert history["topic"].shape == (count,)
    assert 0 <= history["topic"].min() <= history["topic"].max() < len(history["topics"])
    assert history["n_tokens"].min() > 0
    assert len({label.split("/")[0] for label in history["topics"].tolist()}) == 31


@pytest.mark.parametrize("name", ["profiles", "decode_profiles"])
def test_history_rows_are_shares(history: dict[str, np.ndarray], name: str) -> None:
    profiles = history[name].astype(np.float64)
    assert profiles.min() >= 0
    # float16 keeps three decimals of a share, eight shares a row.
    np.testing.assert_allclose(profiles.sum(-1), 1.0, atol=2e-3)
    # Two experts a token: no expert has more than half of a layer's routes.
    assert profiles.max() <= 0.5
    np.testing.assert_allclose(
        np.linalg.norm(history["vectors"].astype(np.float64), axis=1), 1.0, atol=2e-3
    )


@pytest.mark.parametrize("name", ["profiles", "decode_profiles"])
def test_every_expert_of_every_layer_is_used(history: dict[str, np.ndarray], name: str) -> None:
    assert history[name].astype(np.float64).mean(0).min() > 0.01


def test_decode_was_profiled_and_is_not_the_prefill(history: dict[str, np.ndarray]) -> None:
    same = (history["profiles"] == history["decode_profiles"]).all(axis=(1, 2))
    assert same.mean() < 0.01
