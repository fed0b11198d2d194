"""One model's shapes, run by each contender in turn."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from bench.heterogeneous.asking import Asking, Serving, measure
from bench.heterogeneous.host import PROCESSORS, Weights, rates
from bench.heterogeneous.remoe import (
    check_layer,
    check_steps,
    new_machine,
    parts_of_a_step,
    use_remoe,
    without,
)
from bench.heterogeneous.results import BEGAN, Results
from bench.heterogeneous.shapes import build, shapes
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.few_rows import FewRows
from main_model_fn.machine import Machine, slices_for
from main_model_fn.native_layers import use_native_layers
from main_model_fn.placement import ExpertTimes
from main_model_fn.streaming import ExpertWeights
from remoe.kernel.native_library import NativePool

__all__ = ["Contenders", "going_on"]

_CPU = torch.device("cpu")


class Contenders:
    """All of them over the same memory."""

    def __init__(
        self, name: str, args: argparse.Namespace, weights: Weights, results: Results
    ) -> None:
        self.name, self.args, self.weights, self.results = name, args, weights, results
        self.device = torch.device(args.device)
        config = shapes(name, tiny=args.tiny)
        self.model = build(config, self.device)
        self.default = self.model.config._experts_implementation  # noqa: SLF001
        self.modules = experts_by_layer(self.model)
        first: Any = next(iter(self.modules.values()))
        experts, hidden, inner = first.down_proj.shape
        count = len(self.modules)
        self.top_k = config.num_experts_per_tok
        self.slices = args.slices or slices_for(self.top_k, inner)
        self.layers = weights.layers(count, experts, inner, hidden)
        self.experts = weights.experts(count, experts, inner, hidden, self.slices)
        expert_bytes = 3 * inner * hidden * 2
        self.numbers = count * experts * expert_bytes // 2
        self.token_bytes = count * self.top_k * expert_bytes
        results.add(
            model=name,
            what="model",
            layers=count,
            experts=experts,
            top_k=self.top_k,
            slices=self.slices,
            expert_mb=expert_bytes / 1e6,
            token_mb=self.token_bytes / 1e6,
            experts_gb=self.numbers * 2 / 1e9,
        )

    def run(self) -> None:
        attempt = self._attempt
        if not self.args.skip_offload:
            attempt(self.offload)  # before its memory is pinned, which accelerate's users' is not
        with self.weights.pinned(self.numbers) as pinned:
            self.results.add(model=self.name, what="pinned", pinned=pinned)
            attempt(self.rates)
            pool = NativePool(threads=self.threads, spins=self.args.spins)
            attempt(lambda: self.remoe(pool))
            if not self.args.skip_others:
                attempt(self.all_on_gpu)
            pool.close()
        if not self.args.skip_cpu:
            attempt(self.all_on_cpu)

    @property
    def threads(self) -> int:
        return int(max(1, PROCESSORS - self.args.fewer))

    def rates(self) -> None:
        found = rates(self.weights, self.numbers, self.device)
        together = found["cpu_together"] + found["link_together"]
        self.results.add(
            model=self.name,
            what="rates",
            **found,
            floor_tokens_per_s=(found["cpu"] + found["link"]) * 1e9 / self.token_bytes,
            floor_together_tokens_per_s=together * 1e9 / self.token_bytes,
        )

    def offload(self) -> None:
        set_experts(self.model, self.layers)
        for module in self.modules.values():
            cpu_offload(module, execution_device=self.device)
        try:
            self._measure("accelerate cpu_offload", self._asking(2))
        finally:
            for module in self.modules.values():
                remove_hook_from_module(module, recurse=True)

    def remoe(self, pool: NativePool) -> None:
        machine = new_machine(pool, self.device, self.slices)
        for share in self.args.hot:
            meter = use_remoe(self.model, machine, self.experts, share)
            who = f"Remoe, {share:.0%} of experts on the GPU"
            names = {"model": self.name, "who": who}
            serving = Serving(self.model, meter)
            if share == self.args.hot[0]:
                self.results.add(model=self.name, what="times", **asdict(machine.times))  # type: ignore[call-overload,arg-type]
                check_layer(self.results, names, self.model, self.experts[0], self.top_k)
                with check_steps() as errors:
                    serving.decode_s(10)
                self.results.add(**names, what="steps against the library's", errors=errors)
                self._parts(serving)
            measure(
                self.results,
                names,
                serving.decode_s,
                self._asking(3).prefill_s,
                machine.computed,
                prefills=tuple(self.args.prefills),
                before=self._in_time,
            )
        self._without_graphs_or_experts(meter)

    def _parts(self, serving: Serving) -> None:
        """Where a token's time goes."""
        with parts_of_a_step() as found:
            took = serving.decode_s(24)
        token_us = statistics.median(took) * 1e6
        self.results.add(model=self.name, what="parts, us", token=token_us, **found)
        begin = FewRows.begin
        FewRows.begin = lambda *_: True  # type: ignore[method-assign,assignment]
        try:
            with parts_of_a_step() as found:
                took = serving.decode_s(24)
        finally:
            FewRows.begin = begin  # type: ignore[method-assign]
        token_us = statistics.median(took) * 1e6
        self.results.add(model=self.name, what="parts without experts, us", token=token_us, **found)

    def _without_graphs_or_experts(self, meter: Any) -> None:
        without(self.model)
        took = Serving(self.model, meter).decode_s(12)
        speed = 1 / statistics.median(took)
        self.results.add(
            model=self.name, who="Remoe without graphs", what="decode", tokens_per_s=speed
        )

    def all_on_gpu(self) -> None:
        without(self.model)
        self.model.set_experts_implementation(self.default)
        set_experts(self.model, [one.to(self.device) for one in self.layers])
        try:
            self._measure(f"all on the GPU ({self.default})", self._asking(2))
        finally:
            set_experts(self.model, self.layers)

    def all_on_cpu(self) -> None:
        without(self.model)
        pool = NativePool(threads=PROCESSORS, spins=2000)
        machine = new_machine(pool, _CPU, self.slices)
        machine.times = ExpertTimes([1], [0.0], [1.0], 1.0)
        for module in self.modules.values():  # nothing of them is to be moved
            for name in ("gate_up_proj", "down_proj"):
                if hasattr(module, name):
                    delattr(module, name)
        self.model.to(_CPU)
        meter = use_remoe(self.model, machine, self.experts, 0.0)
        without(self.model)
        use_native_layers(self.model, pool, meter)
        asking = Asking(self.model, _CPU, min(2, self.args.limit), threads=PROCESSORS)
        self._measure("all on the CPU (Remoe)", asking, machine)
        pool.close()

    def _asking(self, limit_s: float) -> Asking:
        return Asking(self.model, self.device, min(limit_s, self.args.limit))

    def _measure(self, who: str, asking: Asking, machine: Machine | None = None) -> None:
        measure(
            self.results,
            {"model": self.name, "who": who},
            asking.decode_s,
            asking.prefill_s,
            machine.computed if machine else None,
            prefills=tuple(self.args.prefills),
            before=self._in_time,
        )

    def _in_time(self) -> bool:
        left = self.args.seconds - (time.perf_counter() - BEGAN)
        if left < 2:
            print(f"skipped: {left:.0f} s left", flush=True)
        return left >= 2

    def _attempt(self, step: Callable[[], None]) -> None:
        if self._in_time():
            going_on(self.results, self.name, step)


def set_experts(model: PreTrainedModel, layers: list[ExpertWeights]) -> None:
    for module, weights in zip(experts_by_layer(model).values(), layers, strict=True):
        module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
        module.down_proj = nn.Parameter(weights.down, requires_grad=False)


def going_on(results: Results, name: str, step: Callable[[], None]) -> None:
    """Whatever fails is written down, and the next step is taken."""
    try:
        step()
    except Exception:  # noqa: BLE001
        results.add(model=name, what="failed", error=traceback.format_exc(limit=-4))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
