"""Routed experts, norms and attention of the native kernel against torch in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remoe.experts import ExpertId
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import Attention, Matrix, NativePool, Norm, native_variants
from tests.remoe.kernel.kernel_cases import random_case

VARIANTS = ("amx", "avx512", "avx2", "neon", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STEP = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
property_settings = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module", params=VARIANTS)
def every_pool(request: pytest.FixtureRequest, library: Path) -> Iterator[NativePool]:
    if request.param not in native_variants(library):
        pytest.skip(f"this machine does not run {request.param}")
    opened = NativePool(threads=2, spins=100, variant=request.param, library=library)
    yield opened
    opened.close()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 140),
    experts=st.integers(1, 6),
    resident=st.integers(0, 63),
)
@property_settings
def test_routes_of_resident_experts_are_those_of_rows_gathered_by_expert(
    every_pool: NativePool, seed: int, rows: int, experts: int, resident: int
) -> None:
    """The router's own layout gives, to the last bit, what the gathered one does."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, hidden=24, inner=40, rows=1, experts=experts)
    kernel = NativeKernel(case.experts.__getitem__, every_pool)
    held = [index for index in range(experts) if resident >> index & 1]
    top_k = int(rng.integers(1, experts + 1))
    index = np.stack([rng.permutation(experts)[:top_k] for _ in range(rows)])
    gate = rng.random((rows, top_k), np.float32)
    hidden = rng.standard_normal((rows, 24), np.float32)
    table = kernel.table(0, held, experts=experts, hidden=24)
    assert table.experts == frozenset(held)
    got = np.zeros((rows, 24), np.float32)
    table.add(
        got.ctypes.data,
        Matrix(hidden.ctypes.data, 0),
        index.ctypes.data,
        gate.ctypes.data,
        (rows, top_k),
    )
    expected = np.zeros((rows, 24), np.float32)
    for expert in held:
        tokens, slots = np.nonzero(index == expert)
        if tokens.size:
            gathered = type(case.rows)(
                hidden, [0, tokens.size], tokens.astype(np.int32), gate[tokens, slots]
            )
            kernel.weighted_sum([ExpertId(0, expert)], gathered, expected)
    np.testing.assert_array_equal(got, expected)


def test_a_choice_that_is_no_expert_is_passed_over(every_pool: NativePool) -> None:
    case = random_case(np.random.default_rng(0), hidden=8, inner=8, rows=1, experts=2)
    table = NativeKernel(case.experts.__getitem__, every_pool).table(0, [0, 1], experts=2, hidden=8)
    hidden, got = np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32)
    index, gate = np.array([[-1, 2]]), np.ones((1, 2), np.float32)
    rows = Matrix(hidden.ctypes.data, 0)
    table.add(got.ctypes.data, rows, index.ctypes.data, gate.ctypes.data, (1, 2))
    assert not got.any()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    width=st.integers(1, 100),
    dtype=st.sampled_from(list(DTYPES)),
)
@property_settings
def test_norms(
    every_pool: NativePool, seed: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator)
    output = torch.full_like(x, torch.nan)
    every_pool.normalize(
        Norm(
            rows,
            width,
            Matrix(x.data_ptr(), DTYPES[dtype]),
            weight.data_ptr(),
            1e-5,
            output.data_ptr(),
        )
    )
    exact = x.double()
    exact = weight.double() * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert ((output.double() - exact).abs() <= 2 * STEP[dtype] * exact.abs() + 1e-7).all()


@dataclass(frozen=True)
class Step:
    """New tokens of some requests, and a paged cache with their old ones."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    new: list[int]
    places: list[list[int]]

    def attend(self, pool: NativePool) -> torch.Tensor:
        """[rows, heads, width]; the cache is changed as a step changes it."""
        rows, heads, width = self.query.shape
        write = torch.tensor(
            [at for new, places in zip(self.new, self.places, strict=True) for at in places[-new:]]
        )
        read = torch.tensor([place for places in self.places for place in places])
        row_ends = torch.tensor([0, *np.cumsum(self.new)], dtype=torch.int32)
        read_ends = torch.tensor(
            [0, *np.cumsum([len(places) for places in self.places])], dtype=torch.int32
        )
        output = torch.full_like(self.query, torch.nan)
        tensors = (self.query, self.key, self.value, self.cosine, self.sine, self.keys, self.values)
        pool.attend(
            Attention(
                rows,
                len(self.new),
                heads,
                self.key.shape[1],
                width,
                self.cosine.shape[1],
                DTYPES[self.query.dtype],
                width**-0.5,
                *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
                write.data_ptr(),
                row_ends.data_ptr(),
                read_ends.data_ptr(),
                read.data_ptr(),
                output.data_ptr(),
            )
        )
        return output

    def expected(self) -> torch.Tensor:
        """The same in float64, after `attend` has put the new keys and values into the cache."""
        query = rotated(self.query.double(), self.cosine.double(), self.sine.double())
        sharing = self.query.shape[1] // self.key.shape[1]
        outputs, row = [], 0
        for new, places in zip(self.new, self.places, strict=True):
            keys, values = (
                cache[places].double().repeat_interleave(sharing, 1)
                for cache in (self.keys, self.values)
            )
            for r in range(new):
                seen = len(places) - new + r + 1
                scores = torch.einsum("hd,thd->ht", query[row], keys[:seen])
                weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
                outputs.append(torch.einsum("ht,thd->hd", weights, values[:seen]))
                row += 1
        return torch.stack(outputs)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    part, rest = x[..., : cosine.shape[1]], x[..., cosine.shape[1] :]
    first, second = part.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([part * cosine[:, None] + turned * sine[:, None], rest], -1)


def make_step(
    seed: int,
    groups: int,
    sharing: int,
    width: int,
    rotary: int,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    new = [n for _, n in lengths]
    rows, page = sum(new), 8
    tokens = [old + n for old, n in lengths]
    pages = [-(-count // page) for count in tokens]
    free = rng.permutation(sum(pages)).tolist()
    places = []
    for count, wanted in zip(tokens, pages, strict=True):
        mine = [free.pop() for _ in range(wanted)]
        places.append([mine[t // page] * page + t % page for t in range(count)])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.rand(rows, rotary // 2, generator=generator).repeat(1, 2) * 6
    cache = (sum(pages) * page, groups, width)
    return Step(
        normal(rows, groups * sharing, width),
        normal(rows, groups, width),
        normal(rows, groups, width),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        normal(*cache),
        normal(*cache),
        new,
        places,
    )


steps = st.builds(
    make_step,
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    sharing=st.integers(1, 6),
    width=st.integers(2, 40).map(lambda n: 2 * n),
    rotary=st.sampled_from([0, 2, 4]),
    dtype=st.sampled_from(list(DTYPES)),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=4),
)


@given(step=steps)
@property_settings
def test_attention(every_pool: NativePool, step: Step) -> None:
    before = step.keys.clone()
    output = step.attend(every_pool)
    expected = step.expected()
    tolerance = 2 * STEP[output.dtype] * expected.abs() + 4e-6
    assert ((output.double() - expected).abs() <= tolerance).all()
    # The cache holds the rotated keys where they belong, and nothing else has changed.
    written = [
        at for new, places in zip(step.new, step.places, strict=True) for at in places[-new:]
    ]
    keys = rotated(step.key.double(), step.cosine.double(), step.sine.double())
    stored = step.keys[written].double()
    assert ((stored - keys).abs() <= STEP[output.dtype] * keys.abs() + 1e-6).all()
    others = np.setdiff1d(np.arange(len(before)), written)
    assert torch.equal(step.keys[others], before[others])


def test_a_rows_attention_does_not_depend_on_the_rows_beside_it(every_pool: NativePool) -> None:
    lengths = [(5, 3), (33, 1), (0, 6)]
    together = make_step(3, 2, 3, 64, 64, torch.float32, lengths)
    outputs = together.attend(every_pool)
    start = 0
    for request, new in enumerate(together.new):
        rows = slice(start, start + new)
        alone = replace(
            together,
            query=together.query[rows].contiguous(),
            key=together.key[rows].contiguous(),
            value=together.value[rows].contiguous(),
            cosine=together.cosine[rows].contiguous(),
            sine=together.sine[rows].contiguous(),
            new=[new],
            places=[together.places[request]],
        )
        assert torch.equal(alone.attend(every_pool), outputs[rows])
        start += new
