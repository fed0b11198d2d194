"""Routed experts, norms and attention of the native kernel against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remoe.experts import ExpertId
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool, native_variants
from remoe.kernel.structures import Matrix, Norm, Router
from tests.remoe.kernel.decoder_cases import random_decoder
from tests.remoe.kernel.express_cases import MANNERS, Manner, call_by_lines
from tests.remoe.kernel.kernel_cases import random_case
from tests.remoe.kernel.paged_cases import DTYPES, Step, make_step, rotated

VARIANTS = ("amx", "avx512", "avx2", "neon", "portable")
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
        beside=bool(seed % 2),
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


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    experts=st.integers(1, 70),
    normalized=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
@property_settings
def test_the_likeliest_experts_are_chosen(
    every_pool: NativePool,
    seed: int,
    rows: int,
    experts: int,
    normalized: bool,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # No two alike, whatever the type: else either may be chosen.
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(rows)])
    logits = (logits.float() / 4 - 5).to(dtype)
    top_k = min(experts, 1 + seed % 8)
    index = torch.full((rows, top_k), -1)
    gate = torch.full((rows, top_k), torch.nan)
    every_pool.choose(
        Router(
            rows,
            experts,
            top_k,
            normalized,
            DTYPES[dtype],
            Matrix(logits.data_ptr(), DTYPES[dtype]),
            index.data_ptr(),
            gate.data_ptr(),
        )
    )
    weights, chosen = logits.double().softmax(-1).topk(top_k)
    assert torch.equal(index, chosen)
    expected = weights / weights.sum(-1, keepdim=True) if normalized else weights
    assert ((gate - expected).abs() <= 2 * STEP[dtype] * expected + 1e-7).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_whatever_the_logits_the_chosen_are_different_experts(
    every_pool: NativePool, value: float
) -> None:
    logits, index, gate = torch.zeros(2, 5), torch.full((2, 5), -1), torch.zeros(2, 5)
    logits[0], logits[1, 3] = value, value
    matrix = Matrix(logits.data_ptr(), 0)
    every_pool.choose(Router(2, 5, 5, 1, 0, matrix, index.data_ptr(), gate.data_ptr()))
    assert index.sort(-1).values.tolist() == [list(range(5))] * 2


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(list(DTYPES)))
@property_settings
def test_layers_together_are_the_same_bits_as_their_parts_one_by_one(
    every_pool: NativePool, seed: int, dtype: torch.dtype
) -> None:
    case = random_decoder(np.random.default_rng(seed), every_pool, dtype)
    together, stops = case.together()
    expected, expected_stops = case.one_by_one()
    assert stops == expected_stops
    assert torch.isfinite(expected).all()
    assert torch.equal(together, expected)
    watched, every_layer = case.together(watched=True)
    assert every_layer == list(range(case.shape.layers))
    assert torch.equal(watched, expected)


@given(seed=st.integers(0, 2**31), manner=st.sampled_from(MANNERS))
@property_settings
def test_a_layer_that_calls_by_itself_goes_on_only_from_the_reply_it_knows(
    every_pool: NativePool, seed: int, manner: Manner
) -> None:
    case = random_decoder(np.random.default_rng(seed), every_pool, one_row=True)
    expected, stops = case.one_by_one()
    hidden, answered, others = call_by_lines(case, manner)
    assert torch.equal(hidden, expected)
    if manner == "whole":
        assert (answered, others) == (len(stops), 0)
    elif manner != "pieces":  # which may come together
        assert (answered, others) == (0, bool(stops))
