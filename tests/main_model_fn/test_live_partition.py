"""Experts attached to and detached from a model that serves."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from transformers import PreTrainedModel

from main_model_fn import app as main_app
from main_model_fn.engine import Engine
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.live_partition import LivePartition
from main_model_fn.split import LayerExperts
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.experts import Partition
from remoe.kernel.native_library import NativePool
from remoe.plan import Deployment
from tests.main_model_fn.asking import ask, collect, generate, random_prompt
from tests.main_model_fn.conftest import LIMITS
from tests.main_model_fn.test_families import load, partition_of, tokens_of
from tests.tiny_families import build_tiny_family
from tests.tiny_model import EXPERTS, LAYERS, InProcessTransport, new_meter, reference, split

NOTHING_REMOTE = ((),) * LAYERS
EVERYTHING = tuple(range(EXPERTS))


def deployment_of(
    checkpoint: Checkpoint, remote: tuple[tuple[int, ...], ...], plan_id: str = "plan-new"
) -> Deployment:
    return Deployment(
        plan_id=plan_id,
        model_digest=checkpoint.digest,
        partition=Partition(experts=checkpoint.experts, remote=remote),
        main_memory_gb=1.5,
        origin="epoch",
    )


def layers_of(model: PreTrainedModel) -> list[LayerExperts]:
    return [module.remoe for module in experts_by_layer(model).values()]  # type: ignore[misc]


@pytest.mark.parametrize("natively", [True, False])
def test_eight_streams_do_not_notice(
    tiny_model_dir: Path, natively: bool, pool: NativePool
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    unmodified, meter = reference(tiny_model_dir), new_meter()
    transport = InProcessTransport(tiny_model_dir)
    model = split(tiny_model_dir, NOTHING_REMOTE, transport, meter, pool=pool if natively else None)
    live = LivePartition(model, checkpoint, deployment_of(checkpoint, NOTHING_REMOTE), meter)
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-old")
    engine.start()
    prompts = [random_prompt(seed, 3 + 7 * seed) for seed in range(8)]
    over = threading.Event()
    changes = 0

    def keep_changing() -> None:
        nonlocal changes
        rng = np.random.default_rng(0)
        while not over.is_set():
            remote = tuple(
                tuple(np.flatnonzero(rng.random(EXPERTS) < rng.random()).tolist())
                for _ in range(LAYERS)
            )
            live.change(deployment_of(checkpoint, remote))
            held = [split.local.residents.experts for split in layers_of(model)]
            assert [frozenset(EVERYTHING) - layer for layer in held] == [set(r) for r in remote]
            changes += 1

    async def run() -> list[list[int]]:
        changer = asyncio.create_task(asyncio.to_thread(keep_changing))
        try:
            streams = [collect(engine, ask(prompt, tokens=40)) for prompt in prompts]
            return [tokens for tokens, _ in await asyncio.gather(*streams)]
        finally:
            over.set()
            await changer

    try:
        answers = asyncio.run(run())
    finally:
        engine.stop()
    assert answers == [generate(unmodified, prompt, 40) for prompt in prompts]
    assert changes > 20
    assert len(transport.calls) > 0


def test_what_is_attached_is_no_longer_called_for(tiny_model_dir: Path, pool: NativePool) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    transport, meter = InProcessTransport(tiny_model_dir), new_meter()
    everything = (EVERYTHING,) * LAYERS
    model = split(tiny_model_dir, everything, transport, meter, pool=pool)
    live = LivePartition(model, checkpoint, deployment_of(checkpoint, everything), meter)
    tokens = torch.tensor([random_prompt(0, 9)])
    model(tokens)
    assert len(transport.calls) == LAYERS
    change = live.change(deployment_of(checkpoint, NOTHING_REMOTE, "plan-all"))
    assert (change.attached, change.detached) == (LAYERS * EXPERTS, 0)
    model(tokens)
    assert len(transport.calls) == LAYERS
    assert live.deployment.plan_id == "plan-all"
    assert meter.main_memory_gb == 1.5
    change = live.change(deployment_of(checkpoint, ((0,), (), (1, 2))))
    assert (change.attached, change.detached) == (0, 3)


def test_another_models_deployment_is_refused_and_changes_nothing(tiny_model_dir: Path) -> None:
    checkpoint, meter = Checkpoint.open(tiny_model_dir), new_meter()
    model = split(tiny_model_dir, NOTHING_REMOTE, InProcessTransport(tiny_model_dir), meter)
    before = deployment_of(checkpoint, NOTHING_REMOTE, "plan-before")
    live = LivePartition(model, checkpoint, before, meter)
    with pytest.raises(CheckpointError, match="the model has 3 of 4"):
        live.change(deployment_of(checkpoint, ((0,),)))
    other = Deployment(
        plan_id="plan-other",
        model_digest="sha256:other",
        partition=before.partition,
        main_memory_gb=1.0,
        origin="epoch",
    )
    with pytest.raises(CheckpointError, match="sha256:other; restart the function"):
        live.change(other)
    assert live.deployment == before


def _resident_bytes() -> int:
    """What the system counts as this process's memory, mapped files included (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("natively", [True, False])
def test_detached_memory_returns_to_the_system(
    model_type: str, natively: bool, tmp_path: Path, pool: NativePool
) -> None:
    """For weights used where they lie and for those that must be copied."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "experts": 8, "layers": 2}
    build_tiny_family(tmp_path, model_type, **sizes)
    checkpoint, meter = Checkpoint.open(tmp_path), new_meter(experts=8, layers=2)
    nothing_remote = partition_of(checkpoint, {})
    model = load(checkpoint, nothing_remote, meter=meter, pool=pool if natively else None)
    live = LivePartition(model, checkpoint, deployment_of(checkpoint, nothing_remote.remote), meter)
    tokens = tokens_of(1, 40)
    expected = model(tokens).logits
    full = _resident_bytes()
    live.change(deployment_of(checkpoint, ((0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7))))
    half = _resident_bytes()
    detached_bytes = 14 * checkpoint.expert_size_bytes
    assert full - half > 0.9 * detached_bytes
    live.change(deployment_of(checkpoint, nothing_remote.remote))
    assert _resident_bytes() - half > 0.9 * detached_bytes
    assert torch.equal(model(tokens).logits, expected)


def test_over_http_only_the_plan_that_is_meant_is_replaced(
    tiny_model_dir: Path, pool: NativePool
) -> None:
    checkpoint, meter = Checkpoint.open(tiny_model_dir), new_meter()
    model = split(
        tiny_model_dir, NOTHING_REMOTE, InProcessTransport(tiny_model_dir), meter, pool=pool
    )
    app = FastAPI()
    app.include_router(main_app._router)
    running = deployment_of(checkpoint, NOTHING_REMOTE, "plan-running")
    app.state.partition = LivePartition(model, checkpoint, running, meter)
    app.state.engine = Engine(model, meter, limits=LIMITS, deployment_plan_id=running.plan_id)
    wanted = deployment_of(checkpoint, ((1, 2),) * LAYERS, "plan-wanted")

    async def put(instead_of: str | None) -> int:
        transport = httpx.ASGITransport(app)
        headers = {} if instead_of is None else {"If-Match": f'"{instead_of}"'}
        async with httpx.AsyncClient(transport=transport, base_url="http://main") as client:
            body = msgspec.json.encode(wanted)
            return (await client.put("/v1/deployment", content=body, headers=headers)).status_code

    assert asyncio.run(put("plan-gone")) == 412
    assert app.state.partition.deployment is running
    assert asyncio.run(put("plan-running")) == 200
    assert app.state.partition.deployment == wanted
    assert app.state.engine.deployment_plan_id == "plan-wanted"
    assert asyncio.run(put(None)) == 200
