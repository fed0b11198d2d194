"""`python -m remoe.cli.hardware.expert_speed MODEL_DIR THREADS SECONDS ROWS...`: τ^c, measured.

Calls the kernel that expert functions use, one expert at a time and another one each time, so that
weights come from memory as they do in serving. Prints seconds a call for each number of rows, on
one line each. Its parent may stop and continue it meanwhile: wall time is what counts.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import numpy as np

from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows, open_kernel


def main() -> None:
    model_dir, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    checkpoint = Checkpoint.open(model_dir)
    kernel = open_kernel(
        checkpoint.expert, "auto", activation=checkpoint.activation, threads=threads
    )
    every = [
        ExpertId(layer, index)
        for layer in checkpoint.moe_layers
        for index in range(checkpoint.experts)
    ]
    # Read the weights once, so that no measurement waits for the disk.
    for expert in every[:_MOST_EXPERTS]:
        kernel.weighted_sum([expert], _rows(1, checkpoint.hidden_size))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    turns = itertools.cycle(every[:_MOST_EXPERTS])
    for count in sys.argv[4:]:
        rows = _rows(int(count), checkpoint.hidden_size)
        calls, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            kernel.weighted_sum([next(turns)], rows)
            calls += 1
        sys.stdout.write(f"{spent / max(1, calls):.9f}\n")
        sys.stdout.flush()


# Enough to be larger than any cache, and no more than fits small machines.
_MOST_EXPERTS = 256


def _rows(count: int, hidden_size: int) -> RoutedRows:
    return RoutedRows(
        np.full((count, hidden_size), 0.01, np.float32),
        [0, count],
        np.arange(count, dtype=np.int32),
        np.ones(count, np.float32),
    )


if __name__ == "__main__":
    main()
