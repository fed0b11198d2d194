"""`python -m tests.remoe.kernel.fuzz_kernel LIBRARY SECONDS`: random cases until the time is over.

Buffers end exactly where their numbers do, so that under an address sanitizer each read or write
beyond them ends the process.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np

from remoe.activation import Activation, ActivationName
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool, native_variants
from remoe.kernel.projector import Projector, StoredWeights
from remoe.kernel.structures import Matrix, Norm
from tests.remoe.kernel.decoder_cases import random_decoder
from tests.remoe.kernel.express_cases import MANNERS, call_by_lines
from tests.remoe.kernel.kernel_cases import DTYPES, random_case
from tests.remoe.kernel.paged_cases import DTYPES as TORCH_DTYPES
from tests.remoe.kernel.paged_cases import make_step


def project(rng: np.random.Generator, variant: str, library: Path) -> None:
    rows, width, columns = (int(n) for n in rng.integers(1, 140, 3))
    x = rng.standard_normal((rows, width), np.float32)
    weights = rng.standard_normal((columns, width), np.float32)
    output = np.full((rows, columns), np.nan, np.float32)
    pool = NativePool(threads=2, variant=variant, library=library)
    stored = StoredWeights(
        weights.ctypes.data, 0, columns, x.ctypes.data if columns <= width else None
    )
    Projector(pool, [stored], width=width, dtype=0)(rows, x.ctypes.data, [output.ctypes.data])
    pool.close()
    bias = x[0, :columns] if columns <= width else 0
    np.testing.assert_allclose(output, x @ weights.T + bias, rtol=1e-3, atol=1e-3)


def attend(rng: np.random.Generator, variant: str, library: Path) -> None:
    """Attention writes into the cache and reads it by places: wrong ones would lie beyond it."""
    requests = int(rng.integers(1, 5))
    step = make_step(
        int(rng.integers(2**31)),
        groups=int(rng.integers(1, 4)),
        sharing=int(rng.integers(1, 7)),
        width=2 * int(rng.integers(2, 41)),
        rotary=int(rng.choice([0, 2, 4])),
        dtype=list(TORCH_DTYPES)[rng.integers(3)],
        lengths=[(int(rng.integers(41)), int(rng.integers(1, 7))) for _ in range(requests)],
    )
    pool = NativePool(threads=2, variant=variant, library=library)
    output = step.attend(pool)
    pool.close()
    np.testing.assert_allclose(output.double(), step.expected(), rtol=0.02, atol=0.02)


def decode(rng: np.random.Generator, variant: str, library: Path) -> None:
    """Some layers in one call: its buffers are handed from part to part."""
    pool = NativePool(threads=2, spins=int(rng.integers(50)), variant=variant, library=library)
    case = random_decoder(rng, pool)
    together, stops = case.together()
    expected, expected_stops = case.one_by_one()
    pool.close()
    assert stops == expected_stops
    np.testing.assert_array_equal(together.float(), expected.float())


def call(rng: np.random.Generator, variant: str, library: Path) -> None:
    """Layers that send requests and read replies of any kind."""
    pool = NativePool(threads=2, variant=variant, library=library)
    case = random_decoder(rng, pool, one_row=True)
    hidden, _, _ = call_by_lines(case, MANNERS[rng.integers(len(MANNERS))])
    expected, _ = case.one_by_one()
    pool.close()
    np.testing.assert_array_equal(hidden.float(), expected.float())


def route(rng: np.random.Generator, variant: str, library: Path) -> None:
    """A router's choices, some of them experts that are elsewhere or nowhere."""
    rows, experts, top_k = (int(n) for n in rng.integers(1, (140, 6, 4)))
    case = random_case(rng, hidden=24, inner=int(rng.integers(1, 60)), rows=1, experts=experts)
    pool = NativePool(threads=2, variant=variant, library=library)
    held = np.flatnonzero(rng.random(experts) < 0.7).tolist()
    table = NativeKernel(case.experts.__getitem__, pool).table(0, held, experts=experts, hidden=24)
    hidden = rng.standard_normal((rows, 24), np.float32)
    index = rng.integers(-1, experts + 1, (rows, top_k))
    gate = rng.random((rows, top_k), np.float32)
    total = np.zeros((rows, 24), np.float32)
    weight = np.ones(24, np.float32)
    table.add(
        total.ctypes.data,
        Matrix(hidden.ctypes.data, 0),
        index.ctypes.data,
        gate.ctypes.data,
        (rows, top_k),
    )
    assert np.isfinite(total).all()
    elsewhere = ~np.isin(index, held).any(axis=1)
    assert not total[elsewhere].any()
    values = Matrix(hidden.ctypes.data, 0)
    pool.normalize(Norm(rows, 24, values, weight.ctypes.data, 1e-5, total.ctypes.data))
    pool.close()
    np.testing.assert_allclose(np.square(total).mean(axis=1), 1, rtol=1e-3)


def main() -> None:
    library, seconds = Path(sys.argv[1]), float(sys.argv[2])
    rng = np.random.default_rng(0)
    cases, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        variant = str(rng.choice(native_variants(library)))
        case = random_case(
            rng,
            hidden=int(rng.integers(1, 100)),
            inner=int(rng.integers(1, 100)),
            rows=int(rng.integers(1, 150)),
            experts=int(rng.integers(1, 4)),
            weights=DTYPES[rng.integers(3)],
            input_dtype=DTYPES[rng.integers(3)],
            shift=int(rng.integers(0, 4)),
            biased=bool(rng.integers(2)),
            strided=bool(rng.integers(2)),
        )
        activation = Activation(str(rng.choice(get_args(ActivationName))))  # type: ignore[arg-type]
        pool = NativePool(
            threads=int(rng.integers(1, 4)),
            spins=int(rng.integers(0, 50)),
            variant=variant,
            library=library,
        )
        kernel = NativeKernel(case.experts.__getitem__, pool, activation=activation)
        got = kernel.weighted_sum(case.ids, case.rows)
        kernel.close()
        np.testing.assert_allclose(got, case.expected(activation), rtol=1e-3, atol=1e-3)
        project(rng, variant, library)
        attend(rng, variant, library)
        route(rng, variant, library)
        decode(rng, variant, library)
        call(rng, variant, library)
        cases += 1
    sys.stdout.write(f"{cases} cases\n")


if __name__ == "__main__":
    main()
