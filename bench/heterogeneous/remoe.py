"""Remoe's part: a model's experts given to a machine, checked, and timed step by step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from bench.heterogeneous.results import Results
from bench.heterogeneous.shapes import DTYPE
from main_model_fn import graphed_decoder
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.few_rows import FewRows
from main_model_fn.fused_norm import use_fused_norms
from main_model_fn.graphed_decoder import GraphedDecoder, use_graphs
from main_model_fn.heterogeneous import HeterogeneousExperts
from main_model_fn.machine import Machine
from main_model_fn.metering import StepMeter
from main_model_fn.placement import ExpertTimes
from main_model_fn.split import EXPERTS_IMPLEMENTATION, LayerExperts
from main_model_fn.streaming import ExpertWeights
from remoe.activation import SILU
from remoe.kernel.native_library import NativePool

__all__ = ["check_layer", "check_steps", "new_machine", "parts_of_a_step", "use_remoe", "without"]


def new_machine(pool: NativePool, device: torch.device, slices: int) -> Machine:
    def nothing(_: object) -> Any:
        raise AssertionError("all experts are held")

    return Machine(nothing, pool, device=device, dtype=DTYPE, activation=SILU, slices=slices)


def use_remoe(
    model: PreTrainedModel, machine: Machine, layers: list[list[ExpertWeights]], hot_share: float
) -> StepMeter:
    """Give each layer's experts to a machine, the first ones to its GPU."""
    modules = experts_by_layer(model)
    meter = StepMeter(
        layers=max(modules) + 1,
        experts=len(layers[0]),
        main_memory_gb=1,
    )
    for (layer, module), each in zip(modules.items(), layers, strict=True):
        local = HeterogeneousExperts(layer, machine)
        hot = round(hot_share * len(each))
        local.adopt(
            {index: each[index].to(machine.device) for index in range(hot)},
            {index: each[index] for index in range(hot, len(each))},
        )
        module.remoe = LayerExperts(layer=layer, local=local, fan_out=None, meter=meter)  # type: ignore[arg-type]
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    use_fused_norms(model)
    without(model)
    use_graphs(model, meter)
    return meter


def without(model: PreTrainedModel) -> None:
    """Take the graphs away again, if there are any."""
    model.base_model.__dict__.pop("forward", None)


@torch.no_grad()
def check_layer(
    results: Results,
    names: dict[str, Any],
    model: PreTrainedModel,
    layer: list[ExpertWeights],
    top_k: int,
) -> None:
    """Compare a layer with float32 on the device, by where its experts are made to go.

    Of bfloat16 the relative error is a few thousandths.
    """
    module: Any = next(iter(experts_by_layer(model).values()))
    machine: Machine = module.remoe.local.machine
    measured, device = machine.times, machine.device
    there = [weights.to(device) for weights in layer]
    ways = {
        "as placed": measured,
        "on the CPU": ExpertTimes([1], [0.0], [1.0], 1.0),
        "streamed": ExpertTimes([1], [9.0], [0.0], 1.0),
    }
    errors = {}
    for (way, times), tokens in itertools.product(ways.items(), (1, 3, 300)):
        hidden = torch.randn(tokens, machine.like.shape[1], device=device).to(DTYPE)
        scores = torch.randn(tokens, len(there), device=device)
        gates, index = scores.softmax(-1).topk(top_k)
        machine.times = times
        got = module.remoe.forward(module, hidden, index, gates).float()
        exact = torch.zeros_like(got)
        for expert in index.unique().tolist():
            rows, slots = (index == expert).nonzero(as_tuple=True)
            for part in there[expert].cut():
                gate, up = (hidden[rows].float() @ part.gate_up.float().T).chunk(2, -1)
                output = (functional.silu(gate) * up) @ part.down.float().T
                exact.index_add_(0, rows, output * gates[rows, slots, None])
        error = float((got - exact).norm() / exact.norm())
        errors[way] = max(errors.get(way, 0.0), error)
    machine.times = measured
    results.add(**names, what="relative error", **errors, right=max(errors.values()) < 0.02)


@contextmanager
def check_steps(most: int = 8) -> Iterator[list[float]]:
    """Compare decoding steps' hidden states with the library's own pass over the same tokens."""
    errors = list[float]()
    call = GraphedDecoder.__call__

    def both(self: GraphedDecoder, **given: Any) -> Any:
        got = call(self, **given)
        if given["input_ids"].shape[1] == 1 and len(errors) < most:
            ours = got.last_hidden_state.float().clone()
            theirs = self.by_library(**given).last_hidden_state.float()
            errors.append(float((ours - theirs).norm() / theirs.norm()))
        return got

    GraphedDecoder.__call__ = both  # type: ignore[method-assign]
    try:
        yield errors
    finally:
        GraphedDecoder.__call__ = call  # type: ignore[method-assign]


@contextmanager
def parts_of_a_step() -> Iterator[dict[str, float]]:
    """Microseconds of a step's parts as the host sees them, medians, once the block is left."""
    took: dict[str, list[float]] = {}
    watched: list[tuple[Any, str, str]] = [
        (GraphedDecoder, "__call__", "pass"),
        (graphed_decoder._Step, "run", "step"),  # noqa: SLF001
        (graphed_decoder._Step, "begin", "asking for a layer's experts"),  # noqa: SLF001
        (NativePool, "start_route", "of it, starting the CPU"),
        (FewRows, "finish", "waiting for the CPU"),
    ]
    kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in watched]

    def timed(inner: Any, seconds: list[float]) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = inner(*given, **named)
            seconds.append(time.perf_counter() - began)
            return result

        return call

    for owner, name, label in watched:
        setattr(owner, name, timed(owner.__dict__[name], took.setdefault(label, [])))
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        for owner, name, inner in kept:
            setattr(owner, name, inner)
        found.update(
            {k: round(statistics.median(v[len(v) // 8 :]) * 1e6, 1) for k, v in took.items() if v}
        )
