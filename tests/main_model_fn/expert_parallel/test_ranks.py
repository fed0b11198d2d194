"""Real ranks over gloo: outputs are the dense model's, whatever moves between batches."""

from __future__ import annotations

import socket

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.main_model_fn.expert_parallel.rank_checks import run_checks


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        (2, torch.float32),
        pytest.param(3, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_the_dense_layers_while_replicas_come_and_go(
    ranks: int, dtype: torch.dtype
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    spawn(run_checks, args=(ranks, address, dtype), nprocs=ranks)  # type: ignore[no-untyped-call]
