"""Gate copies on disk, and how predictions are scored."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from remoe.errors import CheckpointError
from remoe.moeless.gates import GATES_FILE, GateCopies, GatesFacts, top_experts
from remoe.moeless.prediction_quality import batch_loads, held_out_batches, overlap, pearson
from remoe.moeless.recording import Recording, RecordingFacts

LAYERS, EXPERTS, HIDDEN = 3, 4, 8


def write_copies(folder: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
    random = np.random.default_rng(0)
    tensors = {
        f"distance-{d}": random.normal(size=(LAYERS - d, EXPERTS, HIDDEN)).astype(np.float16)
        for d in (1, 2)
    }
    save_file(tensors, folder / GATES_FILE)
    facts = GatesFacts(
        model_digest="sha256:m",
        file_digest="",
        layers=[1, 2, 3],  # the first decoder layer is dense
        experts=EXPERTS,
        top_k=2,
        hidden=HIDDEN,
        distances=[1, 2],
        threshold=0.8,
        train_tokens=1,
        test_tokens=1,
        quality=[],
    )
    GateCopies(facts, {}).write_facts(folder)
    return tensors


def test_loads_are_those_of_the_copy_for_that_layer_and_distance(tmp_path: Path) -> None:
    tensors = write_copies(tmp_path)
    copies = GateCopies.read(tmp_path, model_digest="sha256:m")
    hidden = np.random.default_rng(1).normal(size=(50, HIDDEN)).astype(np.float16)
    # Layer 3 is the third with experts: one before is the second, two before is the first.
    for distance, place in ((1, 1), (2, 0)):
        gate = tensors[f"distance-{distance}"][place].astype(np.float32)
        chosen = np.argsort(-(hidden.astype(np.float32) @ gate.T), axis=1)[:, :2]
        expected = np.bincount(chosen.ravel(), minlength=EXPERTS)
        assert copies.loads(3, hidden, distance=distance).tolist() == expected.tolist()
        assert set(copies.routes(3, hidden, distance=distance)[7]) == set(chosen[7])
    for layer, distance in ((1, 1), (2, 2), (3, 3)):
        with pytest.raises(KeyError):
            copies.weight(layer, distance)


def test_copies_of_another_model_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no gate copies"):
        GateCopies.read(tmp_path, model_digest="sha256:m")
    write_copies(tmp_path)
    with pytest.raises(CheckpointError, match=r"are of model sha256:m.*remoe profile gates"):
        GateCopies.read(tmp_path, model_digest="sha256:other")
    path = tmp_path / GATES_FILE
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is not what gates\.json says"):
        GateCopies.read(tmp_path, model_digest="sha256:m")


def test_overlap_counts_experts_in_any_order() -> None:
    actual = np.array([[0, 1], [2, 3], [0, 2]])
    assert overlap(np.array([[1, 0], [2, 0], [1, 3]]), actual) == pytest.approx(0.5)
    assert overlap(actual, actual) == 1


def test_pearson_is_that_of_numpy_and_of_shares() -> None:
    random = np.random.default_rng(0)
    true, guess = random.integers(0, 50, (2, 6, 4)).astype(float)
    shares = [loads / loads.sum(axis=1, keepdims=True) for loads in (guess, true)]
    expected = np.corrcoef(shares[0].ravel(), shares[1].ravel())[0, 1]
    assert pearson(guess, true) == pytest.approx(expected)
    assert pearson(guess * 10, true) == pytest.approx(expected)
    assert pearson(np.ones((2, 4)), true[:2]) == 0


def test_loads_of_a_batch_leave_out_tokens_of_none() -> None:
    loads = batch_loads(np.array([[0, 1], [1, 2], [0, 2]]), np.array([0, -1, 1]), 3)
    assert loads.tolist() == [[1, 1, 0], [1, 0, 1]]


def test_top_experts_are_the_largest() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 9)).astype(np.float32)
    expected = np.sort(np.argsort(logits, axis=1)[:, -3:], axis=1)
    assert np.array_equal(np.sort(top_experts(logits, 3), axis=1), expected)


def test_batches_are_of_held_out_prompts_reading_and_step_by_step(tmp_path: Path) -> None:
    prompts, read, wrote = 20, 3, 2
    prompt = np.repeat(np.arange(prompts, dtype=np.int32), read + wrote)
    decoded = np.tile([False] * read + [True] * wrote, prompts)
    decoded_last = (prompt == prompts - 1) & decoded  # the last one answered nothing
    prompt, decoded = prompt[~decoded_last], decoded[~decoded_last]
    facts = RecordingFacts("m", [0], 4, 1, 8, ["set/topic"] * prompts)
    routes = np.zeros((len(prompt), 1, 1), np.uint16)
    recording = Recording.write(
        tmp_path,
        facts,
        routes=routes,
        gates=np.zeros((1, 4, 8), np.float32),
        prompt=prompt,
        decoded=decoded,
    )
    assert np.flatnonzero(recording.held_out()).tolist() == [7, 8, 9, 17, 18, 19]
    reading, steps = held_out_batches(Recording.read(tmp_path), prompts_per_batch=4)
    held_out = recording.tokens_of(np.array([7, 8, 9, 17, 18, 19]))
    assert np.array_equal(reading >= 0, held_out & ~decoded)
    assert np.array_equal(steps >= 0, held_out & decoded)
    assert sorted(np.bincount(reading[reading >= 0]).tolist()) == [2 * read, 4 * read]
    # Two batches, two steps each; one of them lacks the prompt that answered nothing.
    assert sorted(np.bincount(steps[steps >= 0]).tolist()) in ([1, 1, 4, 4], [2, 2, 3, 3])


def test_a_folder_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recording.json").write_bytes(msgspec.json.encode({"model_digest": "m"}))
    with pytest.raises(CheckpointError, match="--keep-recording"):
        Recording.read(tmp_path)
