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
from tests.remoe.kernel.kernel_cases import DTYPES, random_case


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
        cases += 1
    sys.stdout.write(f"{cases} cases\n")


if __name__ == "__main__":
    main()
