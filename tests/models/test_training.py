from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.smollm2_8x135m.build import BuildInputs
from models.smollm2_8x135m.delta import write_delta
from models.smollm2_8x135m.gguf_base import GgufBase
from models.smollm2_8x135m.packing import PADDING, PREFIX, Piece, pack
from models.smollm2_8x135m.routing import js_divergence, routing_figures
from tests.models.conftest import TINY

torch = pytest.importorskip("torch")


def piece(*ids: int) -> Piece:
    return Piece(np.array(ids, np.int32), np.ones(len(ids), np.float32))


def test_packing_keeps_documents_apart_behind_one_prefix() -> None:
    rows = pack([piece(5, 6), piece(7, 8, 9)], prefix=[1, 2], length=8, seed=0)
    assert len(rows) == 1
    assert rows.ids[0, :2].tolist() == [1, 2]
    assert (rows.documents[0] == PREFIX).sum() == 2
    assert (rows.documents[0] == PADDING).sum() == 1
    for number in (0, 1):
        here = np.flatnonzero(rows.documents[0] == number)
        assert rows.positions[0, here].tolist() == list(range(2, 2 + len(here)))
        assert rows.previous[0, here[0]] == 1  # the prefix's last token predicts the first


def test_training_form_equals_the_built_checkpoint(
    tmp_path: Path, tiny_inputs: BuildInputs
) -> None:
    transformers = pytest.importorskip("transformers")
    import dataclasses

    from models.smollm2_8x135m.build import ensure_checkpoint
    from models.smollm2_8x135m.delta import Delta
    from models.smollm2_8x135m.recipe import delta_name
    from models.smollm2_8x135m.upcycled import Upcycled

    assert tiny_inputs.gguf is not None
    model = Upcycled(TINY, GgufBase(tiny_inputs.gguf, TINY), 2, torch.float32, seed=0)
    with torch.no_grad():
        for name, parameter in model.trained.items():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    paths = (tmp_path / "trained-1.safetensors", tmp_path / "trained-2.safetensors")
    write_delta(paths, TINY, 2, model.delta())
    # What was written, not what was trained: the comparison is of arithmetic, not of rounding.
    delta = Delta(paths)
    with torch.no_grad():
        for layer in range(TINY.layers):
            for part, target in zip(
                ("gate.weight", "experts.Agu", "experts.Bgu", "experts.Adn", "experts.Bdn"),
                model.factors(layer),
                strict=True,
            ):
                assert delta_name(layer, part) in model.delta()
                target.copy_(torch.from_numpy(delta.tensor(layer, part).copy()))
    inputs = dataclasses.replace(tiny_inputs, deltas=paths)
    folder = ensure_checkpoint(tmp_path / "cache", lambda text, share: None, inputs)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    rows = pack([piece(40, 41, 42), piece(50, 51)], prefix=[1, 30], length=8, seed=0)
    with torch.no_grad():
        hidden, _ = model(
            *(torch.from_numpy(part).long() for part in (rows.ids, rows.positions, rows.documents))
        )
        for number in (0, 1):
            here = rows.documents[0] == number
            alone = torch.tensor([[1, 30, *rows.ids[0][here].tolist()]])
            expected = reference.model(alone).last_hidden_state[0, 2:]
            # The checkpoint's weights are bf16, the training form's are not.
            error = (hidden[0, torch.from_numpy(here)] - expected).norm() / expected.norm()
            assert error < 0.05


def test_js_divergence_knows_its_bounds() -> None:
    one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert js_divergence(one, other) == pytest.approx(np.log(2))
    assert js_divergence(one, one) == 0


def test_routing_figures_tell_topics_apart() -> None:
    sure = np.eye(4)[[0, 0, 1, 1]][:, None, :]  # [prompts, 1 layer, 4 experts]
    figures = routing_figures(sure, np.array([0, 0, 1, 1], np.int32), ["a/x", "b/y"])
    assert figures["js_same_set"] == 0
    assert figures["js_across_sets"] == pytest.approx(np.log(2), abs=1e-4)
    assert figures["top_2_share"] == 1
    assert figures["min_expert_share"] == 0
