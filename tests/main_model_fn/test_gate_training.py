"""Recording what gates see, and copies that learn from it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from main_model_fn.gate_recording import record_gate_inputs
from main_model_fn.gate_training import _misplaced, make_gate_copies
from main_model_fn.model_gates import model_gates
from remoe.errors import CheckpointError
from remoe.moeless.gates import GateCopies
from remoe.moeless.prediction_quality import overlap
from remoe.moeless.recording import Recording, RecordingFacts
from tests.tiny_families import DENSE_LAYERS, build_tiny_family
from tests.tiny_model import build_tiny_checkpoint, reference

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15]]


def test_recording_holds_each_tokens_gate_input_and_choice(tmp_path: Path) -> None:
    model = reference(build_tiny_checkpoint(tmp_path / "model"))
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        before = model(ids).logits
    recording = record_gate_inputs(
        model,
        PROMPTS,
        tmp_path / "recording",
        labels=["a/x", "a/y", "b/z"],
        digest="sha256:m",
        decode_tokens=3,
        batch_tokens=12,
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)  # the tap is gone, and changed nothing
    again = Recording.read(tmp_path / "recording")
    assert again.facts == recording.facts
    for prompt, tokens in enumerate(PROMPTS):
        mine = again.prompt == prompt
        assert (mine & ~again.decoded).sum() == len(tokens)
        assert (mine & again.decoded).sum() == 3
    # A prompt alone goes through the same gate inputs, in the order of its tokens.
    gate_inputs: list[torch.Tensor] = []
    gate = model.base_model.layers[1].mlp.gate
    with (
        torch.no_grad(),
        gate.register_forward_pre_hook(lambda _, args: gate_inputs.append(args[0])),
    ):
        model(ids)
    mine = (again.prompt == 2) & ~again.decoded
    recorded = torch.from_numpy(np.array(again.hidden(1)[mine], np.float32))
    torch.testing.assert_close(
        recorded, gate_inputs[0].reshape(recorded.shape), atol=2e-2, rtol=2e-3
    )
    for layer in range(len(again.facts.layers)):
        logits = again.hidden(layer).astype(np.float32) @ again.gates[layer].T
        chosen = np.argsort(-logits, axis=1)[:, :2]
        assert overlap(chosen, again.routes[:, layer]) > 0.97  # half precision may flip a tie


@pytest.mark.parametrize("family", ["glm4_moe", "granitemoe", "qwen3_moe", "gpt_oss"])
def test_gates_are_found_in_families_of_other_layouts(tmp_path: Path, family: str) -> None:
    model = reference(build_tiny_family(tmp_path, family))
    gates = model_gates(model)
    assert all(gate.shape[1] == model.config.hidden_size for gate in gates.values())
    layers = range(model.config.num_hidden_layers)
    assert list(gates) == [layer for layer in layers if layer not in DENSE_LAYERS.get(family, ())]


def test_a_model_without_a_known_gate_is_refused(tmp_path: Path) -> None:
    model = reference(build_tiny_checkpoint(tmp_path))
    del model.base_model.layers[0].mlp.gate
    with pytest.raises(CheckpointError, match="layer 0: 0 modules beside the experts"):
        model_gates(model)


def _turned_recording(folder: Path, *, turned: bool) -> Recording:
    """Three layers of linear gates; if `turned`, hidden states are turned between layers.

    A copy of a later gate is then useless, and a trained one can be perfect.
    """
    random = np.random.default_rng(0)
    tokens, hidden, experts, layers = 3_000, 16, 4, 3
    turn = np.linalg.qr(random.normal(size=(hidden, hidden)))[0] if turned else np.eye(hidden)
    gates = random.normal(size=(layers, experts, hidden)).astype(np.float32)
    states: NDArray[np.float64] = random.normal(size=(tokens, hidden))
    folder.mkdir()
    routes = []
    for layer in range(layers):
        np.save(folder / f"hidden-{layer}.npy", states.astype(np.float16))
        logits = states.astype(np.float16).astype(np.float32) @ gates[layer].T
        routes.append(np.argsort(-logits, axis=1)[:, :2])
        states = states @ turn
    return Recording.write(
        folder,
        RecordingFacts("sha256:m", [0, 2, 4], experts, 2, hidden, ["a/x"] * 100),
        routes=np.stack(routes, axis=1).astype(np.uint16),
        gates=gates,
        prompt=np.repeat(np.arange(100, dtype=np.int32), 30),
        decoded=np.tile(np.arange(30) >= 20, 100),
    )


def test_weak_copies_are_fine_tuned_and_accurate_ones_left_alone(tmp_path: Path) -> None:
    turned = _turned_recording(tmp_path / "turned", turned=True)
    copies = make_gate_copies(turned, tmp_path / "gates", distances=[1, 2, 3])
    assert copies.facts.distances == [1, 2]  # there is no layer three after any
    assert {(row.layer, row.distance) for row in copies.facts.quality} == {(2, 1), (4, 1), (4, 2)}
    for row in copies.facts.quality:
        assert row.tuned
        assert row.plain_overlap < 0.7
        assert row.overlap > 0.95
        assert row.step_pearson > 0.9 > row.plain_step_pearson
        assert row.pearson > 0.9
    # What was written is what is measured, on prompts that were not learned from.
    read = GateCopies.read(tmp_path / "gates", model_digest="sha256:m")
    held_out = turned.tokens_of(np.flatnonzero(turned.held_out()))
    routes = read.routes(4, turned.hidden(1)[held_out], distance=1)
    (row,) = [row for row in read.facts.quality if (row.layer, row.distance) == (4, 1)]
    assert overlap(routes, turned.routes[held_out, 2]) == pytest.approx(row.overlap, abs=2e-3)

    alike = _turned_recording(tmp_path / "alike", turned=False)
    copies = make_gate_copies(alike, tmp_path / "plain", distances=[1])
    assert not any(row.tuned for row in copies.facts.quality)
    assert np.array_equal(copies.weight(2, 1), alike.gates[1].astype(np.float16))


@given(st.integers(2, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e - 1))), st.data())
def test_the_order_learned_is_of_each_chosen_expert_before_each_other(
    size: tuple[int, int], data: st.DataObject
) -> None:
    experts, top_k = size
    order = data.draw(st.permutations(range(experts)))
    logits = torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=experts, max_size=experts)))
    chosen, others = order[:top_k], order[top_k:]
    pairs = [math.log1p(math.exp(logits[o] - logits[c])) for c in chosen for o in others]
    loss = _misplaced(logits[None], torch.tensor([chosen]))
    assert loss.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4, abs=1e-6)
