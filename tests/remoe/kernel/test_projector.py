"""Projections on the native kernel against float64, and their rounding against torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remoe.kernel.native_library import NativePool, native_variants
from remoe.kernel.projector import Projector, StoredWeights

VARIANTS = ("amx", "avx512", "avx2", "neon", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module", params=VARIANTS)
def every_pool(request: pytest.FixtureRequest, library: Path) -> Iterator[NativePool]:
    if request.param not in native_variants(library):
        pytest.skip(f"this machine does not run {request.param}")
    opened = NativePool(threads=2, spins=100, variant=request.param, library=library)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Given:
    rows: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]

    def project(self, pool: NativePool) -> list[torch.Tensor]:
        outputs = [self.rows.new_full((len(self.rows), len(w)), torch.nan) for w in self.weights]
        projector = Projector(
            pool,
            [
                StoredWeights(
                    w.data_ptr(), DTYPES[w.dtype], len(w), None if b is None else b.data_ptr()
                )
                for w, b in zip(self.weights, self.biases, strict=True)
            ],
            width=self.rows.shape[1],
            dtype=DTYPES[self.rows.dtype],
        )
        projector(len(self.rows), self.rows.data_ptr(), [out.data_ptr() for out in outputs])
        return outputs


def make(
    seed: int, rows: int, width: int, columns: list[int], dtype: torch.dtype, stored: torch.dtype
) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return Given(
        torch.randn(rows, width, generator=generator).to(dtype),
        [torch.randn(n, width, generator=generator).to(stored) for n in columns],
        [torch.randn(n, generator=generator) if n % 2 else None for n in columns],
    )


@given(
    case=st.builds(
        make,
        seed=st.integers(0, 2**31),
        rows=st.integers(1, 150),
        width=st.integers(1, 100),
        columns=st.lists(st.integers(1, 200), min_size=1, max_size=4),
        dtype=st.sampled_from(list(DTYPES)),
        stored=st.sampled_from(list(DTYPES)),
    )
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_equals_torch(every_pool: NativePool, case: Given) -> None:
    for output, weights, bias in zip(
        case.project(every_pool), case.weights, case.biases, strict=True
    ):
        exact = case.rows.double() @ weights.double().T + (0 if bias is None else bias.double())
        magnitude = case.rows.double().abs() @ weights.double().abs().T + 1
        step = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[output.dtype]
        # One rounding of the result, and float32's in the sum, which counts where terms cancel.
        allowed = exact.abs() * step + magnitude * 2**-21 + 1e-7
        assert ((output.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_every_kind_of_number_as_torch_does(
    every_pool: NativePool, dtype: torch.dtype
) -> None:
    """One column of weight 1 passes float32 sums on; the bias brings numbers of all magnitudes."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2**-24, 3e38], "f4"
    )
    ties = (rng.integers(0, 2**16, 500, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    half = (np.arange(1, 2048, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-24)
    bias = torch.from_numpy(np.concatenate([numbers, special, ties, half]))
    case = Given(torch.zeros(1, 1, dtype=dtype), [torch.zeros(len(bias), 1, dtype=dtype)], [bias])
    (output,) = case.project(every_pool)
    expected = bias.to(dtype)[None]
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(7), expected.nan_to_num(7))


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(every_pool: NativePool) -> None:
    case = make(1, 140, 70, [33], torch.float32, torch.bfloat16)
    (together,) = case.project(every_pool)
    for row in (0, 5, 127, 128, 139):
        (alone,) = Given(case.rows[row : row + 1].clone(), case.weights, case.biases).project(
            every_pool
        )
        assert torch.equal(alone[0], together[row])
