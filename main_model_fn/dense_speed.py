"""How long a model takes without its experts: τ^f, t^f and τ^sw of the cost model (A.2).

It is served as it will be: by the engine, all layers in one native call where the model allows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from main_model_fn.config import MainSettings
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.local_experts import ExpertsModule, LocalExperts
from main_model_fn.metering import StepMeter
from main_model_fn.native_stop import Stop
from main_model_fn.native_threads import open_pool
from main_model_fn.served_model import load_served_model
from main_model_fn.transport import PendingReply
from remoe.checkpoint import Checkpoint
from remoe.expert_call import ExpertCall
from remoe.experts import Partition
from remoe.generation import GenerateRequest, SamplingParams

__all__ = ["DenseTimes", "measure_dense"]

_STEPS = 32


@dataclass(frozen=True, slots=True)
class DenseTimes:
    """Medians, of all layers together; `move_s_per_token` is one way, of one layer."""

    rows: list[int]
    prefill_s: list[float]
    step_s: float
    move_s_per_token: float
    device: str


class _NoExperts:
    """Experts of a layer that take no time and add nothing."""

    observe = None
    beside = False

    def __init__(self, layer: int, local: LocalExperts) -> None:
        self.layer = layer
        self.local = local  # of which there are none

    def forward(
        self,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return torch.zeros_like(hidden)

    def answer(self, module: ExpertsModule, stop: Stop) -> None:
        """The sum is zero already."""


class _NoTransport:
    """No expert is ever called."""

    beside = False

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        raise AssertionError("experts are left out")

    def line(self, layer: int, shape: object) -> None:
        return None

    def replicas(self, layer: int) -> int:
        return 1

    def close(self) -> None: ...


def measure_dense(model_dir: Path, *, rows: list[int], seconds: float) -> DenseTimes:
    """Read prompts of so many tokens, then write tokens after the longest, all without experts.

    Each is repeated for `seconds`, and at least three times.
    """
    checkpoint = Checkpoint.open(model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = _engine(checkpoint, device, most_tokens=max(rows) + _STEPS)
    engine.start()
    try:
        prompts = _Prompts(engine, checkpoint.vocab_size)
        prefill_s = [_median_s(partial(prompts.first_s, count), seconds) for count in rows]
        step_s = _median_s(partial(prompts.step_s, max(rows)), seconds)
    finally:
        engine.stop()
    return DenseTimes(rows, prefill_s, step_s, _move_s(checkpoint, device), device.type)


def _engine(checkpoint: Checkpoint, device: torch.device, *, most_tokens: int) -> Engine:
    everything = tuple(
        tuple(range(checkpoint.experts)) if layer in checkpoint.moe_layers else ()
        for layer in range(checkpoint.layers)
    )
    settings = MainSettings.model_construct(kernel="auto", threads=None)
    meter = StepMeter(layers=checkpoint.layers, experts=checkpoint.experts, main_memory_gb=1.0)
    model = load_served_model(
        checkpoint.model_dir,
        partition=Partition(experts=checkpoint.experts, remote=everything),
        dtype=None,
        device=device,
        transport=_NoTransport(),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 1.0),
        meter=meter,
        pool=open_pool(settings, device),
    )
    for layer, module in experts_by_layer(model).items():
        split = _NoExperts(layer, module.remoe.local)  # type: ignore[union-attr,arg-type]
        module.remoe = split  # type: ignore[assignment]  # not a submodule: no parameters
    page_tokens = 32
    limits = EngineLimits(
        kv_tokens=(2 + most_tokens // page_tokens) * page_tokens,
        page_tokens=page_tokens,
        batch_tokens=most_tokens,
        max_requests=1,
        max_queue=1,
    )
    recurrent = checkpoint.family.recurrent
    return Engine(model, meter, limits=limits, deployment_plan_id="", recurrent=recurrent)


class _Prompts:
    """Random ones, so that none begins as one before it: what was computed for that is kept."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def first_s(self, tokens: int) -> float:
        """From when a prompt of so many tokens is begun to its first new token."""
        return asyncio.run(self._ask(tokens, 1))[0]

    def step_s(self, tokens: int) -> float:
        """A token after a prompt of so many."""
        return float(np.median(asyncio.run(self._ask(tokens, _STEPS))[1:]))

    async def _ask(self, tokens: int, new_tokens: int) -> list[float]:
        """When the first token came after the prompt was begun, and each after the one before."""
        request = GenerateRequest(
            request_id="dense",
            plan_id=None,
            prompt_tokens=self._random.integers(self._vocab_size, size=tokens).tolist(),
            max_new_tokens=new_tokens,
            stop_tokens=[],
            sampling=SamplingParams(temperature=0),
            running_stats=True,
        )
        at, first_s = list[float](), 0.0
        async for event in self._engine.generate(request):
            if event.tokens and event.stats is not None:
                at.append(time.perf_counter())
                first_s = event.stats.first_token_s - event.stats.queue_s
        return [first_s, *np.diff(at).tolist()]


def _median_s(measured_s: Callable[[], float], seconds: float) -> float:
    """After one that is not counted, for so long, and at least three times."""
    measured_s()
    took, until = list[float](), time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < until:
        took.append(measured_s())
    return float(np.median(took))


def _move_s(checkpoint: Checkpoint, device: torch.device) -> float:
    """A token's hidden vector from the device to the CPU; nothing moves without a GPU."""
    if device.type != "cuda":
        return 0.0
    many = torch.zeros((256, checkpoint.hidden_size), dtype=torch.bfloat16, device=device)

    def run() -> float:
        before = time.perf_counter()
        many.cpu()
        return time.perf_counter() - before

    return _median_s(run, 0.2) / len(many)
