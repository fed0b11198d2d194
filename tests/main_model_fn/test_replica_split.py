"""Rows of one function split over its replicas, as plain arithmetic and by real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from main_model_fn.fan_out import FanOut
from main_model_fn.http_transport import HttpTransport
from main_model_fn.metering import StepMeter
from main_model_fn.replica_split import SPLIT_FROM_ROUTES, expert_cost, split_over_replicas
from main_model_fn.routes import Batch, Route
from main_model_fn.transport import ExpertTransport, RemoteResult
from remoe.checkpoint import Checkpoint
from remoe.expert_call import MAX_BODY_BYTES
from tests.calls import expert_call, sums
from tests.processes import ExpertProcess
from tests.tiny_model import EXPERTS, HIDDEN, LAYERS, InProcessTransport

loads = st.dictionaries(st.integers(0, 200), st.integers(1, 400), min_size=1, max_size=24)


def cost(share: dict[int, Route]) -> int:
    return sum(expert_cost(len(route.tokens)) for route in share.values())


@given(rows=loads, replicas=st.integers(1, 8))
def test_every_route_goes_to_one_replica_and_none_has_much_more(
    rows: dict[int, int], replicas: int
) -> None:
    routes = {
        expert: Route(np.arange(count), np.full(count, expert)) for expert, count in rows.items()
    }
    shares = split_over_replicas(routes, replicas)
    assert 1 <= len(shares) <= replicas
    for expert, count in rows.items():
        tokens = [share[expert].tokens for share in shares if expert in share]
        assert sorted(np.concatenate(tokens).tolist()) == list(range(count))
    # LPT's bound (Thm 4's core): a fair share of all the pieces, and one piece more. A piece is a
    # fair share of the experts at most, and the reading of its weights.
    total = sum(cost(share) for share in shares)
    piece = sum(map(expert_cost, rows.values())) / replicas + expert_cost(0)
    assert max(map(cost, shares)) <= total / replicas + piece + expert_cost(0)


def test_longest_first() -> None:
    """7, 6, 5, 4, 3 for two: 7 | 6, 6 + 5, 7 + 4, and the last to either; the best were 13."""
    unit = 1000  # so that reading weights does not matter
    routes = {
        expert: Route(np.arange(count * unit), np.zeros(count * unit, np.intp))
        for expert, count in enumerate((7, 6, 5, 4, 3))
    }
    sums = sorted(round(cost(share) / unit) for share in split_over_replicas(routes, 2))
    assert sums == [11, 14]


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def replicas(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[int, HttpTransport]]:
    """So many real replicas, and a transport that has found them all."""
    count: int = request.param
    now = 0.0
    with ExpertProcess(
        tiny_model_dir, tmp_path_factory.mktemp("replicas"), last_layer=LAYERS - 1, replicas=count
    ) as function:
        transport = HttpTransport(
            function.topology, timeout_s=30, hedge_floor_s=30, clock=lambda: now
        )
        call = expert_call(
            Checkpoint.open(tiny_model_dir).digest,
            np.ones((1, HIDDEN), np.float32),
            {0: [(0, 1.0)]},
        )
        until = time.monotonic() + 30
        found = 0
        while found < count and time.monotonic() < until:
            now += 1.0  # it looks for others once a second
            transport.send(call).result()  # and only while the function is warm
            found = transport.replicas(0)
        assert found == count
        yield count, transport
        transport.close()


class Answers(StepMeter):
    """Keeps who answered."""

    def __init__(self) -> None:
        super().__init__(layers=LAYERS, experts=EXPERTS, main_memory_gb=1.0)
        self.replicas: list[str] = []

    def record_call(self, rows: NDArray[np.intp], result: RemoteResult, memory_gb: float) -> None:
        self.replicas.append(result.replica)


def layer_sums(
    model_dir: Path, transport: ExpertTransport, batch: Batch
) -> tuple[torch.Tensor, list[str]]:
    """The layer's output, and who computed each part of it."""
    meter = Answers()
    fan_out = FanOut(
        layer=1,
        model_digest=Checkpoint.open(model_dir).digest,
        transport=transport,
        function_memory_gb=0.5,
        meter=meter,
        payload_limit_bytes=MAX_BODY_BYTES,
    )
    total = torch.zeros(batch.hidden.shape)
    for call in fan_out.send(batch, batch.routes):
        partial = fan_out.receive(call)
        assert partial is not None
        total[torch.from_numpy(call.rows)] += torch.from_numpy(sums(partial, len(call.rows)).copy())
    return total, meter.replicas


@given(
    rows=st.integers(1, 150), top_k=st.integers(1, EXPERTS), skewed=st.booleans(), seed=st.integers(0, 99)
)  # fmt: skip
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_split_over_real_replicas_gives_the_same_sums(
    tiny_model_dir: Path,
    replicas: tuple[int, HttpTransport],
    rows: int,
    top_k: int,
    skewed: bool,
    seed: int,
) -> None:
    count, transport = replicas
    rng = np.random.default_rng(seed)
    experts = np.tile(np.arange(EXPERTS), (rows, 1))
    index = (experts if skewed else rng.permuted(experts, axis=1))[:, :top_k]
    generator = torch.Generator().manual_seed(seed)
    batch = Batch.of(
        torch.randn((rows, HIDDEN), generator=generator),
        torch.from_numpy(index.copy()),
        torch.rand((rows, top_k), generator=generator),
    )
    in_process = InProcessTransport(tiny_model_dir)
    expected, _ = layer_sums(tiny_model_dir, in_process, batch)
    got, asked = layer_sums(tiny_model_dir, transport, batch)
    assert len(in_process.calls) == 1
    assert len(asked) == len(set(asked)) == (count if rows * top_k >= SPLIT_FROM_ROUTES else 1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
