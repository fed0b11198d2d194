"""The native kernel against torch and numpy: every variant, layout and type it claims to take."""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remoe.activation import SILU, Activation, ActivationName
from remoe.experts import ExpertId
from remoe.kernel.interface import KernelUnavailableError, RoutedRows, open_kernel
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool, native_variants
from remoe.kernel.numpy_kernel import NumpyKernel
from remoe.mapped import to_float32
from tests.remoe.kernel.kernel_cases import DTYPES, Case, StoredDtype, random_case, stored

VARIANTS = ("amx", "avx512", "avx2", "neon", "portable")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, library: Path) -> str:
    name: str = request.param
    if name not in native_variants(library):
        pytest.skip(f"this machine does not run {name}")
    return name


@pytest.fixture(scope="module")
def new_kernel(library: Path) -> Iterator[_Kernels]:
    kernels = _Kernels(library)
    yield kernels
    kernels.close()


class _Kernels:
    """Kernels for cases; closed together."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._open: list[NativeKernel] = []

    def __call__(
        self, case: Case, variant: str, *, threads: int = 1, activation: Activation = SILU
    ) -> NativeKernel:
        self.close()
        kernel = NativeKernel(
            case.experts.__getitem__,
            NativePool(threads=threads, spins=100, variant=variant, library=self._library),
            activation=activation,
        )
        self._open.append(kernel)
        return kernel

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


cases = st.builds(
    lambda seed, **how: random_case(np.random.default_rng(seed), **how),
    seed=st.integers(0, 2**32 - 1),
    hidden=st.integers(1, 80),
    inner=st.integers(1, 150),
    rows=st.integers(1, 70),
    experts=st.integers(1, 4),
    weights=st.sampled_from(DTYPES),
    input_dtype=st.sampled_from(DTYPES),
    shift=st.integers(0, 3),
    biased=st.booleans(),
    strided=st.booleans(),
)
activations = st.builds(
    Activation,
    name=st.sampled_from(get_args(ActivationName)),
    alpha=st.floats(0.5, 2),
    limit=st.floats(0.25, 7),
)
property_settings = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_close(got: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    scale = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6 * scale + 1e-30)


@given(case=cases, threads=st.integers(1, 2), activation=activations)
@property_settings
def test_equals_torch(
    new_kernel: _Kernels, variant: str, case: Case, threads: int, activation: Activation
) -> None:
    kernel = new_kernel(case, variant, threads=threads, activation=activation)
    assert_close(kernel.weighted_sum(case.ids, case.rows), case.expected(activation))


@given(case=cases, activation=activations)
@property_settings
def test_numpy_equals_torch(case: Case, activation: Activation) -> None:
    kernel = NumpyKernel(case.experts.__getitem__, activation=activation)
    assert_close(kernel.weighted_sum(case.ids, case.rows), case.expected(activation))


@pytest.mark.parametrize(
    ("rows", "hidden", "inner"), [(300, 48, 96), (9, 576, 1536), (200, 64, 80), (3, 1000, 9000)]
)
def test_more_rows_than_a_block_and_wider_rows_than_a_panel(
    new_kernel: _Kernels, variant: str, rows: int, hidden: int, inner: int
) -> None:
    rng = np.random.default_rng(1)
    case = random_case(rng, hidden=hidden, inner=inner, rows=rows, experts=3)
    kernel = new_kernel(case, variant, threads=2)
    assert_close(kernel.weighted_sum(case.ids, case.rows), case.expected())


@given(case=cases)
@property_settings
def test_threads_do_not_change_a_bit(new_kernel: _Kernels, variant: str, case: Case) -> None:
    one, two = (
        new_kernel(case, variant, threads=threads).weighted_sum(case.ids, case.rows)
        for threads in (1, 2)
    )
    assert one.tobytes() == two.tobytes()


@given(case=cases.filter(lambda case: case.ids), threads=st.integers(1, 2))
@property_settings
def test_a_call_beside_gives_the_same_bits(
    new_kernel: _Kernels, variant: str, case: Case, threads: int
) -> None:
    kernel = new_kernel(case, variant, threads=threads)
    expected = kernel.weighted_sum(case.ids, case.rows)
    for _ in range(3):
        total = np.zeros_like(expected)
        kernel.start(case.ids, case.rows, total)()
        assert total.tobytes() == expected.tobytes()


def test_calls_beside_are_counted_where_others_look(library: Path) -> None:
    case = random_case(np.random.default_rng(0), hidden=16, inner=8, rows=3)
    pool = NativePool(library=library)
    kernel = NativeKernel(case.experts.__getitem__, pool, activation=SILU)
    total = np.zeros(case.rows.hidden.shape, np.float32)
    kernel.start(case.ids, case.rows, total)()
    ended = np.full(1, 7, np.int32)
    pool.tell(ended)
    assert (ended[0], pool.begun) == (0, 0)
    for count in (1, 2, 3):
        kernel.start(case.ids, case.rows, total)()
        assert (ended[0], pool.begun, pool.busy) == (count, count, False)
    pool.close()


@given(case=cases, choice=st.integers(0, 2**16))
@property_settings
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    new_kernel: _Kernels, variant: str, case: Case, choice: int
) -> None:
    kernel = new_kernel(case, variant)
    row = choice % len(case.rows.hidden)
    alone = case.of_row(row)
    together = kernel.weighted_sum(case.ids, case.rows)[row]
    assert kernel.weighted_sum(alone.ids, alone.rows)[0].tobytes() == together.tobytes()


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_go_where_torch_lets_them_go(
    new_kernel: _Kernels, variant: str, rows: int, special: float
) -> None:
    rng = np.random.default_rng(2)
    case = random_case(rng, hidden=37, inner=50, rows=rows, experts=1, weights="F16")
    x = case.rows.hidden.copy()
    x[0, 36] = special
    case = Case(
        case.experts, RoutedRows(x, [0, rows], np.arange(rows, dtype="<i4"), np.ones(rows, "<f4"))
    )
    got = new_kernel(case, variant).weighted_sum(case.ids, case.rows)
    expected = case.expected()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(np.isfinite(got[1:]), True)
    assert not np.isfinite(got[0]).any()


@pytest.mark.parametrize("rows", [1, 35])
@pytest.mark.parametrize("odd", ["gate", "up", "down"])
def test_matrices_of_different_types(
    new_kernel: _Kernels, variant: str, odd: str, rows: int
) -> None:
    """An expert is computed in tiles throughout, or part by part."""
    rng = np.random.default_rng(4)
    case = random_case(rng, hidden=64, inner=96, rows=rows, experts=2, biased=True)
    mixed = {
        expert: replace(tensors, **{odd: stored(getattr(tensors, odd).to_float32(), "F32")})
        for expert, tensors in case.experts.items()
    }
    case = Case(mixed, case.rows)
    assert_close(new_kernel(case, variant).weighted_sum(case.ids, case.rows), case.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_denormal_weights_count(
    new_kernel: _Kernels, variant: str, dtype: StoredDtype, rows: int
) -> None:
    rng = np.random.default_rng(3)
    case = random_case(rng, hidden=40, inner=40, rows=rows, experts=1, weights="F32")
    tiny = np.float32(2e-6 if dtype == "F16" else 2e-39)
    (tensors,) = case.experts.values()
    small = {
        name: stored(tiny * getattr(tensors, name).to_float32(), dtype) for name in ("gate", "up")
    }
    x = to_float32(case.rows.hidden) * np.float32(0.02 / tiny)
    case = Case(
        {
            expert: type(tensors)(small["gate"], small["up"], tensors.down)
            for expert in case.experts
        },
        RoutedRows(x, case.rows.offsets, case.rows.row_index, case.rows.gate),
    )
    expected = case.expected()
    assert np.abs(expected).max() > 1e-5
    if variant == "amx" and dtype == "BF16":  # what the processor's manual says of its tiles
        expected = np.zeros_like(expected)
    assert_close(new_kernel(case, variant).weighted_sum(case.ids, case.rows), expected)


@pytest.mark.parametrize(
    "activation", [Activation(name) for name in get_args(ActivationName)], ids=str
)
def test_activations_over_all_magnitudes(
    new_kernel: _Kernels, variant: str, activation: Activation
) -> None:
    """One-by-one experts whose gate passes x on, and whose up and down are 1."""
    x = np.array(
        [[-1e30], [-104], [-88.5], [-5], [-1e-20], [0], [1e-20], [3], [88.5], [1e30]], "<f4"
    )
    one = stored(np.ones((1, 1), np.float32), "F32")
    up = stored(np.ones((1, 1), np.float32), "F32")
    case = random_case(np.random.default_rng(0), hidden=1, inner=1, rows=1, experts=1)
    tensors = type(case.experts[case.ids[0]])(gate=one, up=up, down=one)
    rows = RoutedRows(x, [0, 10], np.arange(10, dtype="<i4"), np.ones(10, "<f4"))
    case = Case({case.ids[0]: tensors}, rows)
    got = new_kernel(case, variant, activation=activation).weighted_sum(case.ids, case.rows)
    with np.errstate(over="ignore"):
        expected = case.expected(activation).astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-35)


def test_no_experts_and_no_rows_are_zero(new_kernel: _Kernels, variant: str) -> None:
    case = random_case(np.random.default_rng(0), hidden=8, inner=8, rows=2, experts=2)
    kernel = new_kernel(case, variant)
    nowhere = np.zeros(0, "<i4")
    for ids in (case.ids, []):
        rows = RoutedRows(case.rows.hidden, [0] * (len(ids) + 1), nowhere, nowhere.view("<f4"))
        assert not kernel.weighted_sum(ids, rows).any()


def test_one_kernel_takes_experts_of_any_shape_in_turn(library: Path, variant: str) -> None:
    rng = np.random.default_rng(4)
    cases = [
        random_case(rng, hidden=hidden, inner=inner, rows=rows, experts=1)
        for hidden, inner, rows in ((40, 70, 50), (7, 5, 3), (90, 33, 140), (33, 200, 1))
    ]
    tensors = {ExpertId(layer, 0): case.experts[ExpertId(0, 0)] for layer, case in enumerate(cases)}
    pool = NativePool(threads=2, variant=variant, library=library)
    kernel = NativeKernel(tensors.__getitem__, pool)
    for layer in (0, 1, 2, 3, 0, 1):
        got = kernel.weighted_sum([ExpertId(layer, 0)], cases[layer].rows)
        assert_close(got, cases[layer].expected())
    assert kernel.loaded == 4
    kernel.close()


def test_the_choice_falls_back_to_numpy_only_when_allowed(library: Path, tmp_path: Path) -> None:
    case = random_case(np.random.default_rng(0), hidden=8, inner=8, rows=2)
    read, missing = case.experts.__getitem__, tmp_path / "missing.so"
    assert open_kernel(read, "auto", library=library).description.startswith("native")
    assert open_kernel(read, "numpy", library=library).description == "numpy"
    fallback = open_kernel(read, "auto", library=missing)
    assert fallback.description == "numpy"
    assert_close(fallback.weighted_sum(case.ids, case.rows), case.expected())
    with pytest.raises(KernelUnavailableError, match=r"remoe\.kernel\.native\.build"):
        open_kernel(read, "native", library=missing)


def test_a_library_of_another_kind_is_refused() -> None:
    other = ctypes.util.find_library("m")
    assert other is not None
    with pytest.raises(KernelUnavailableError, match="remoe_kernel_abi"):
        NativePool(library=Path(other))


def test_an_unknown_variant_is_refused(library: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="variant mmx"):
        NativePool(variant="mmx", library=library)
