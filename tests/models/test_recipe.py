from __future__ import annotations

import numpy as np
import pytest

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.recipe import ARCHITECTURE


def test_parameters_are_those_of_the_published_shape() -> None:
    assert ARCHITECTURE.parameters == 692_036_928


def test_low_rank_adds_the_scaled_product() -> None:
    base = np.ones((3, 2), np.float32)
    a = np.array([[1.0, 2.0]], np.float32)
    b = np.array([[1.0], [0.0], [-1.0]], np.float32)
    expected = np.array([[3.0, 5.0], [1.0, 1.0], [-1.0, -3.0]], np.float32)
    np.testing.assert_array_equal(recipe.low_rank(base, a, b, 2.0), expected)


def test_bf16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between two bf16 values and goes to the even one; a little more goes up.
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 2**-8 + 2**-12, -2.5], np.float32)
    assert [hex(bits) for bits in recipe.bf16_bits(values)] == [
        "0x3f80",
        "0x3f80",
        "0x3f81",
        "0xc020",
    ]


def test_bf16_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(recipe.bf16_bits(values), theirs)


def test_quantize_is_within_half_a_step() -> None:
    values = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    values[1] = 0.0
    codes, scale = recipe.quantize(values, axis=1)
    assert scale.shape == (4, 1)
    assert np.abs(codes * scale - values).max() <= scale.max() / 2 + 1e-6
    assert not codes[1].any()


def test_digest_changes_with_every_input() -> None:
    def digest(
        name: str = "n", gguf: str = "g", deltas: tuple[str, ...] = ("d",), m: float = 1.0
    ) -> str:
        return recipe.checkpoint_digest(name, ARCHITECTURE, gguf, deltas, m)

    variants = {digest(), digest("o"), digest(gguf="h"), digest(deltas=("e",)), digest(m=2.0)}
    assert len(variants) == 5
    assert digest() == digest()
