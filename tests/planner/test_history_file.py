from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from planner.history_file import read_history
from remoe.errors import SettingsError
from tests.planner.worlds import EXPERTS, HIDDEN, LAYERS, World, history_arrays, save_arrays


def test_reads_what_was_written(world: World) -> None:
    entries = read_history(world.history_file(20), world.identity)
    written = history_arrays(world.model, 20)
    np.testing.assert_allclose(entries.vectors, written["vectors"].astype(float), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(entries.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(entries.profiles, written["profiles"].astype(float), atol=1e-3)
    np.testing.assert_allclose(entries.profiles.sum(axis=2), 1, atol=1e-6)
    assert entries.decode_profiles is not None
    decode = written["decode_profiles"].astype(float)
    np.testing.assert_allclose(entries.decode_profiles, decode, atol=1e-3)
    np.testing.assert_allclose(entries.decode_profiles.sum(axis=2), 1, atol=1e-6)
    assert entries.topics == ("algebra", "cooking")
    assert entries.topic.tolist() == [0, 1] * 10


def test_a_file_without_decode_profiles_is_read_and_lets_prefill_stand_in(world: World) -> None:
    arrays = history_arrays(world.model, 3)
    del arrays["decode_profiles"]
    path = save_arrays(world.folder / "old.npz", arrays)
    entries = read_history(path, world.identity)
    assert entries.decode_profiles is None
    profiles = world.planner(history=path).history.profiles(range(3))
    np.testing.assert_array_equal(profiles[:, 1], profiles[:, 0])


def test_an_empty_history_is_a_history(world: World) -> None:
    assert len(read_history(world.history_file(0), world.identity).vectors) == 0


def test_another_models_history_is_refused_naming_both_digests(world: World) -> None:
    arrays = history_arrays(world.model, 3)
    arrays["model_digest"] = np.array("sha256:other")
    path = save_arrays(world.folder / "other.npz", arrays)
    with pytest.raises(SettingsError) as caught:
        read_history(path, world.identity)
    assert "sha256:other" in caught.value.message
    assert world.model.digest in caught.value.message
    assert str(path) in caught.value.message


N = 3
BAD: dict[str, tuple[str, NDArray[np.generic], str]] = {
    "narrow vectors": ("vectors", np.zeros((N, HIDDEN - 1), np.float16), "vectors is"),
    "fewer profiles": ("profiles", np.ones((N - 1, LAYERS, EXPERTS), np.float16), "profiles is"),
    "rows not shares": ("profiles", np.ones((N, LAYERS, EXPERTS), np.float16), "sum to 1"),
    "fewer decodes": ("decode_profiles", np.ones((2, 3, 4), np.float16), "decode_profiles is"),
    "decodes not shares": (
        "decode_profiles",
        np.ones((N, LAYERS, EXPERTS), np.float16),
        "of decode_profiles does not sum to 1",
    ),
    "decodes not numbers": (
        "decode_profiles",
        np.full((N, LAYERS, EXPERTS), np.inf, np.float16),
        "decode_profiles holds numbers that are not finite",
    ),
    "negative shares": (
        "profiles",
        np.tile(np.array([2, -1, 0, 0], np.float16), (N, LAYERS, 1)),
        "sum to 1",
    ),
    "not a number": ("vectors", np.full((N, HIDDEN), np.nan, np.float16), "not finite"),
    "empty prompts": ("n_tokens", np.zeros(N, np.int32), "below 1"),
    "scalar lengths": ("n_tokens", np.array(3, np.int32), "vectors is"),
    "unknown topic": ("topic", np.full(N, 2, np.int32), "topic"),
    "topics as numbers": ("topics", np.arange(2), "topics is"),
    "pickled topics": ("topics", np.array([{"a": 1}, None], object), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_array_is_named(world: World, case: str) -> None:
    name, array, complaint = BAD[case]
    arrays = history_arrays(world.model, N) | {name: array}
    path = world.folder / "bad.npz"
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # typeshed's **kwds
    with pytest.raises(SettingsError, match=complaint) as caught:
        read_history(path, world.identity)
    assert str(path) in caught.value.message


def test_a_missing_array_is_named(world: World) -> None:
    arrays = history_arrays(world.model, N)
    del arrays["topic"]
    with pytest.raises(SettingsError, match=r"no array.*topic"):
        read_history(save_arrays(world.folder / "bad.npz", arrays), world.identity)


def test_a_missing_file_is_a_settings_error(world: World) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.npz"):
        read_history(world.folder / "nowhere.npz", world.identity)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_file_of_another_kind_is_a_settings_error(world: World, content: bytes) -> None:
    path = world.folder / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="not a usable history"):
        read_history(path, world.identity)


def test_a_single_array_file_is_a_settings_error(world: World) -> None:
    path = world.folder / "bad.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SettingsError, match="not a usable history"):
        read_history(path, world.identity)


def test_a_damaged_file_is_refused_or_still_whole(world: World) -> None:
    content = world.history_file(20).read_bytes()
    chance = random.Random(0)
    path: Path = world.folder / "bad.npz"
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        if chance.random() < 0.5:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            read_history(path, world.identity)
        except SettingsError:
            refused += 1
    assert refused > 100
