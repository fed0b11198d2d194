"""How long a model takes without its experts: τ^f, t^f and τ^sw of the cost model (A.2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from main_model_fn.config import MainSettings
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.loading import load_split_model
from main_model_fn.metering import StepMeter
from main_model_fn.native_threads import open_pool
from main_model_fn.transport import PendingReply
from remoe.checkpoint import Checkpoint
from remoe.expert_call import ExpertCall
from remoe.experts import Partition

__all__ = ["DenseTimes", "measure_dense"]


@dataclass(frozen=True, slots=True)
class DenseTimes:
    """Medians, of all layers together; `move_s_per_token` is one way, of one layer."""

    rows: list[int]
    prefill_s: list[float]
    step_s: float
    move_s_per_token: float
    device: str


class _NoExperts:
    """Experts that take no time and add nothing."""

    def forward(
        self,
        module: object,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return torch.zeros_like(hidden)


class _NoTransport:
    """No expert is ever called."""

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        raise AssertionError("experts are left out")

    def replicas(self, layer: int) -> int:
        return 1

    def close(self) -> None: ...


def measure_dense(model_dir: Path, *, rows: list[int], seconds: float) -> DenseTimes:
    """Read prompts of so many tokens, then write tokens after the longest, all without experts.

    Each is repeated for `seconds`, and at least three times.
    """
    checkpoint = Checkpoint.open(model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = tuple(
        tuple(range(checkpoint.experts)) if layer in checkpoint.moe_layers else ()
        for layer in range(checkpoint.layers)
    )
    settings = MainSettings.model_construct(kernel="auto", threads=None)
    model = load_split_model(
        model_dir,
        partition=Partition(experts=checkpoint.experts, remote=everything),
        dtype=None,
        device=device,
        transport=_NoTransport(),
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 1.0),
        meter=StepMeter(
            layers=checkpoint.layers,
            experts=checkpoint.experts,
            main_memory_gb=1.0,
            on_gpu=device.type == "cuda",
        ),
        pool=open_pool(settings, device),
    )
    for module in experts_by_layer(model).values():
        module.remoe = _NoExperts()  # type: ignore[assignment]  # not a submodule: no parameters
    with torch.inference_mode():
        prefill_s = [_median_s(_prefill(model, count, device), seconds) for count in rows]
        step_s = _step_s(model, max(rows), seconds, device)
    return DenseTimes(rows, prefill_s, step_s, _move_s(checkpoint, device), device.type)


def _prefill(model: PreTrainedModel, tokens: int, device: torch.device) -> Callable[[], None]:
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)

    def run() -> None:
        model(ids, use_cache=True, logits_to_keep=1)
        _wait(device)

    return run


def _step_s(model: PreTrainedModel, context: int, seconds: float, device: torch.device) -> float:
    cache = DynamicCache(config=model.config)
    model(torch.ones((1, context), dtype=torch.long, device=device), past_key_values=cache)
    one = torch.ones((1, 1), dtype=torch.long, device=device)

    def run() -> None:
        model(one, past_key_values=cache, use_cache=True)
        _wait(device)

    return _median_s(run, seconds)


def _median_s(run: Callable[[], None], seconds: float) -> float:
    run()
    took = list[float]()
    while len(took) < 3 or sum(took) < seconds:
        before = time.perf_counter()
        run()
        took.append(time.perf_counter() - before)
    return float(np.median(took))


def _move_s(checkpoint: Checkpoint, device: torch.device) -> float:
    """A token's hidden vector from the device to the CPU; nothing moves without a GPU."""
    if device.type != "cuda":
        return 0.0
    many = torch.zeros((256, checkpoint.hidden_size), dtype=torch.bfloat16, device=device)

    def run() -> None:
        many.cpu()

    return _median_s(run, 0.2) / len(many)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
