"""The expert function's arithmetic against torch, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_fn.compute import ExpertComputer, RefusedCallError
from remoe.checkpoint import Checkpoint
from remoe.expert_call import ExpertCall
from remoe.kernel.interface import open_kernel
from remoe.kernel.numpy_kernel import silu
from tests.calls import expert_call, sums
from tests.tiny_families import build_tiny_family
from tests.tiny_model import EXPERTS, HIDDEN, LAYERS, reference


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir: Path) -> Checkpoint:
    return Checkpoint.open(tiny_model_dir)


@pytest.fixture(scope="module")
def computer(checkpoint: Checkpoint) -> ExpertComputer:
    return ExpertComputer(checkpoint, first_layer=0, last_layer=LAYERS - 1)


def test_silu_equals_torchs_and_never_overflows() -> None:
    x = np.array([-1e30, -100, -1.5, -0.0, 0.0, 1e-30, 2.5, 100, 1e30], np.float32)
    expected = torch.nn.functional.silu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(silu(x), expected, rtol=1e-6, atol=1e-30)


@pytest.fixture(scope="module")
def torch_experts(tiny_model_dir: Path) -> list[Callable[..., torch.Tensor]]:
    """Each layer's experts module of the unmodified model."""
    modules = dict(reference(tiny_model_dir).named_modules())
    return [modules[f"model.layers.{layer}.mlp.experts"] for layer in range(LAYERS)]


@given(rows=st.integers(1, 20), seed=st.integers(0, 2**31), layer=st.integers(0, LAYERS - 1))
@settings(deadline=None, max_examples=30)
def test_weighted_sums_equal_torchs(
    checkpoint: Checkpoint,
    computer: ExpertComputer,
    torch_experts: list[Callable[..., torch.Tensor]],
    rows: int,
    seed: int,
    layer: int,
) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
    chosen = np.sort(rng.permuted(np.tile(np.arange(EXPERTS), (rows, 1)), axis=1)[:, :2], axis=1)
    gates = rng.random((rows, 2)).astype(np.float32)
    routes = {
        int(e): [(int(r), float(gates[r, s])) for r, s in np.argwhere(chosen == e)]
        for e in np.unique(chosen)
    }
    call = expert_call(checkpoint.digest, hidden, routes, layer=layer)
    with torch.no_grad():
        expected = torch_experts[layer](*map(torch.from_numpy, (hidden, chosen, gates)))
    got = sums(computer.compute(call), rows)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_answer_is_the_same_on_half_of_the_threads(
    checkpoint: Checkpoint, library: Path
) -> None:
    kernel = open_kernel(checkpoint.expert, "native", threads=4, library=library)
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=0, kernel=kernel)
    call = good_call(checkpoint)
    assert computer.compute(msgspec.structs.replace(call, beside=True)) == computer.compute(call)


def test_only_called_experts_are_read(checkpoint: Checkpoint) -> None:
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=0)
    assert computer.loaded == 0
    hidden = np.ones((1, HIDDEN), np.float32)
    computer.compute(expert_call(checkpoint.digest, hidden, {2: [(0, 1.0)]}))
    assert computer.loaded == 1


def one_row(**change: object) -> dict[str, object]:
    """What makes a good call one of a single row with two routes, and `change`."""
    two = {"row_index": bytes(8), "gate": bytes(8), "experts": [0, 3], "offsets": [0, 1, 2]}
    return {"rows": 1, "hidden": bytes(4 * HIDDEN), **two, **change}


def test_one_row_may_go_to_two_experts(computer: ExpertComputer, checkpoint: Checkpoint) -> None:
    call = msgspec.structs.replace(good_call(checkpoint), **one_row())
    assert not sums(computer.compute(call), 1).any()


def good_call(checkpoint: Checkpoint) -> ExpertCall:
    hidden = np.ones((2, HIDDEN), np.float32)
    return expert_call(checkpoint.digest, hidden, {0: [(0, 0.5), (1, 0.5)], 3: [(1, 0.5)]})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model_digest": "sha256:other"}, "wrong_model"),
        ({"layer": LAYERS}, "unknown_expert"),
        ({"experts": [0, EXPERTS]}, "unknown_expert"),
        ({"experts": [0, -1]}, "unknown_expert"),
        ({"rows": 3}, "wrong_shape"),
        ({"dtype": "bfloat16"}, "wrong_shape"),
        ({"hidden": b""}, "wrong_shape"),
        ({"offsets": [0, 2]}, "wrong_shape"),
        ({"offsets": [1, 2, 3]}, "wrong_shape"),
        ({"offsets": [0, 5, 3]}, "wrong_shape"),
        ({"offsets": []}, "wrong_shape"),
        ({"gate": b"1234"}, "wrong_shape"),
        ({"row_index": np.array([0, 1, 2], "<i4").tobytes()}, "wrong_shape"),
        ({"row_index": np.array([0, 1, -1], "<i4").tobytes()}, "wrong_shape"),
        ({"row_index": np.array([1, 1, 0], "<i4").tobytes()}, "wrong_shape"),
        (one_row(row_index=np.array([0, 1], "<i4").tobytes()), "wrong_shape"),
        (one_row(experts=[0], offsets=[0, 2]), "wrong_shape"),
    ],
)
def test_refuses_what_it_cannot_answer_rightly(
    computer: ExpertComputer, checkpoint: Checkpoint, change: dict[str, object], code: str
) -> None:
    with pytest.raises(RefusedCallError) as refused:
        computer.compute(msgspec.structs.replace(good_call(checkpoint), **change))
    assert refused.value.code == code


def test_a_layer_range_outside_the_model_is_an_error_at_once(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="the model has 3"):
        ExpertComputer(checkpoint, first_layer=0, last_layer=LAYERS)


def test_a_call_to_a_dense_layer_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_tiny_family(tmp_path, "glm4_moe"))
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=2)
    call = expert_call(checkpoint.digest, np.ones((1, HIDDEN), np.float32), {0: [(0, 1.0)]})
    with pytest.raises(RefusedCallError, match="layer 0 is dense") as refused:
        computer.compute(call)
    assert refused.value.code == "unknown_expert"
    answer = computer.compute(msgspec.structs.replace(call, layer=1))
    assert sums(answer, 1).shape == (1, HIDDEN)
