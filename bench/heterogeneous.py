"""Decoding and prefill of real MoE shapes on one GPU and the processors beside it.

    python -u bench/heterogeneous.py --out results.json

Weights are random and made here, from the published configurations alone. All contenders run the
same transformers model, whose experts are: all on the GPU; all on the CPU, with everything else
(Remoe without a GPU); in the CPU's memory and fetched whole, layer by layer, by accelerate's
`cpu_offload`; or Remoe's, with none or a part of them in the GPU's memory. Decoding is one stream
of random tokens, whose routes are as spread as they get, after a prompt of 32.

The floor of decoding is the bytes of a token's experts over the rates at which the CPU reads memory
and pinned memory reaches the GPU, both measured here, alone and together. Each figure is appended
to --out as soon as it is known. Needs transformers, accelerate, structlog, msgspec, a C compiler.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import cpu_offload, init_empty_weights
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DynamicCache,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from main_model_fn.device_experts import DeviceSum
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.heterogeneous import HeterogeneousExperts, Machine
from main_model_fn.host_memory import host_empty, pin, unpin
from main_model_fn.metering import StepMeter
from main_model_fn.native_layers import use_native_layers
from main_model_fn.placement import ExpertTimes
from main_model_fn.routes import Batch
from main_model_fn.split import EXPERTS_IMPLEMENTATION, LayerExperts, split_experts_forward
from main_model_fn.streaming import ExpertWeights, Staging
from remoe.activation import SILU
from remoe.kernel import native_library
from remoe.kernel.interface import KernelUnavailableError
from remoe.kernel.native_kernel import NativeKernel
from remoe.kernel.native_library import NativePool, native_variants

DTYPE = torch.bfloat16
CPU = torch.device("cpu")

# As in the models' config.json.
CONFIGS: dict[str, Callable[[], Any]] = {
    "OLMoE-1B-7B": lambda: OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    "Qwen1.5-MoE-A2.7B": lambda: Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
    ),
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


@dataclass
class Results:
    """What is known so far, on the screen and in the file."""

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        text = " ".join(f"{name}={_short(value)}" for name, value in row.items())
        print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1))


BEGAN = time.perf_counter()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Weights:
    """One block of random numbers in the host's memory, of which every model takes its experts."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._device = device
        self.block = host_empty((size_bytes // 2,), DTYPE, pinned=False)
        self.filled = 0
        self._pinned = False

    def fill(self, numbers: int) -> None:
        """With the same 0.5 GB again and again, which no cache holds."""
        piece = torch.empty(min(numbers, 1 << 28), dtype=DTYPE, device=self._device)
        piece.normal_(0, 0.02)
        piece = piece.cpu()
        torch.set_num_threads(PROCESSORS)
        while self.filled < numbers:
            count = min(len(piece), numbers - self.filled)
            self.block[self.filled : self.filled + count].copy_(piece[:count])
            self.filled += count
        torch.set_num_threads(1)

    @contextmanager
    def pinned(self, numbers: int) -> Iterator[bool]:
        done = self._device.type == "cuda" and pin(self.block[:numbers])
        try:
            yield done
        finally:
            if done:
                wait(self._device)
                unpin(self.block)

    def layers(self, count: int, experts: int, inner: int, hidden: int) -> list[ExpertWeights]:
        """Each with all of its experts: [experts, 2 x inner, hidden] and [experts, hidden, inner]."""
        each = experts * 3 * inner * hidden
        self.fill(count * each)
        parts = (self.block[i * each : (i + 1) * each] for i in range(count))
        up = experts * 2 * inner * hidden
        return [
            ExpertWeights(
                part[:up].view(experts, 2 * inner, hidden), part[up:].view(experts, hidden, inner)
            )
            for part in parts
        ]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(config: Any, device: torch.device) -> PreTrainedModel:
    """The model with random weights but for its experts, which are nowhere."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    experts = {id(p) for m in experts_by_layer(model).values() for p in m.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in experts:
                continue
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made = made.fill_(1.0) if made.dim() == 1 else made.normal_(0, 0.02)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return model.eval().requires_grad_(requires_grad=False)


def set_experts(model: PreTrainedModel, layers: list[ExpertWeights]) -> None:
    for module, weights in zip(experts_by_layer(model).values(), layers, strict=True):
        module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
        module.down_proj = nn.Parameter(weights.down, requires_grad=False)


class Asking:
    """Times a model; never longer than `limit_s` at one figure, but for what is under way."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, limit_s: float, *, threads: int = 1
    ) -> None:
        self._threads = threads  # torch's, for prompts: Remoe's own leave it one
        self._model = model
        self._device = device
        self._limit_s = limit_s
        self._generator = torch.Generator().manual_seed(0)

    def _tokens(self, count: int) -> torch.Tensor:
        vocabulary = self._model.config.vocab_size
        found = torch.randint(vocabulary, (1, count), generator=self._generator)
        return found.to(self._device)

    def _forward(self, tokens: torch.Tensor, cache: DynamicCache) -> None:
        logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())  # as a server has to: waits for it

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def decode_s(self, most: int = 64) -> list[float]:
        """Seconds of each of some tokens after a prompt, and 4 more to warm up."""
        cache, took = self._cache(), list[float]()
        self._forward(self._tokens(32), cache)
        began = time.perf_counter()
        for count in range(most + 4):
            token = self._tokens(1)
            before = time.perf_counter()
            self._forward(token, cache)
            after = time.perf_counter()
            if count >= 4 or after - began > self._limit_s / 2:
                took.append(after - before)
            if after - began > self._limit_s and took:
                break
        return took

    @torch.inference_mode()
    def prefill_s(self, length: int, most: int = 4) -> list[float]:
        """Seconds of reading a prompt, after one to warm up if there is time for it."""
        torch.set_num_threads(self._threads)
        took, began = list[float](), time.perf_counter()
        while len(took) < most + 1 and (not took or time.perf_counter() - began < self._limit_s):
            tokens, cache = self._tokens(length), self._cache()
            before = time.perf_counter()
            self._forward(tokens, cache)
            took.append(time.perf_counter() - before)
        torch.set_num_threads(1)
        return took[1:] or took


def rates(weights: Weights, numbers: int, device: torch.device) -> dict[str, float]:
    """GB/s at which all processors read, and pinned memory reaches the GPU: alone, and together."""
    block = weights.block[: min(numbers, 1 << 31)]
    parts = [part.view(torch.int64).numpy() for part in block.chunk(PROCESSORS)]
    there = torch.empty(1 << 28, dtype=DTYPE, device=device)[: len(block)]
    copied = len(there) * 2

    def read() -> float:
        readers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return len(block) * 2 / 1e9 / (time.perf_counter() - began)

    def copy(times: int) -> float:
        wait(device)
        began = time.perf_counter()
        for _ in range(times):
            there.copy_(block[: len(there)], non_blocking=True)
        wait(device)
        return times * copied / 1e9 / (time.perf_counter() - began)

    alone = max(read() for _ in range(3))
    link = max(copy(2) for _ in range(3))
    found = dict[str, float]()
    copies = max(2, round(3 * len(block) * 2 / alone * link / copied))
    beside = threading.Thread(target=lambda: found.update(link=copy(copies)))
    beside.start()
    together = statistics.median(read() for _ in range(2))
    beside.join()
    return {"cpu": alone, "link": link, "cpu_together": together, "link_together": found["link"]}


def measure(
    results: Results,
    names: dict[str, Any],
    asking: Asking,
    machine: Machine | None = None,
    *,
    prefills: tuple[int, ...],
    before: Callable[[], bool],
) -> None:
    """All figures of one contender, decoding first."""

    def shares() -> dict[str, float]:
        if machine is None:
            return {}
        total = sum(machine.computed.values()) or 1
        found = {f"share_{k}": round(v / total, 3) for k, v in machine.computed.items()}
        machine.computed.clear()
        return found

    if not before():
        return
    shares()
    took = asking.decode_s()
    results.add(
        **names,
        what="decode",
        tokens_per_s=1 / statistics.median(took),
        mean_tokens_per_s=len(took) / sum(took),
        samples=len(took),
        **shares(),
    )
    for length in prefills:
        if not before():
            return
        took = asking.prefill_s(length)
        results.add(
            **names,
            what=f"prefill {length}",
            seconds=statistics.median(took),
            samples=len(took),
            **shares(),
        )


def use_remoe(
    model: PreTrainedModel,
    machine: Machine,
    layers: list[ExpertWeights],
    hot_share: float,
) -> None:
    """Give each layer's experts to a machine, the first ones to its GPU."""
    modules = experts_by_layer(model)
    meter = StepMeter(
        layers=max(modules) + 1,
        experts=len(layers[0].down),
        main_memory_gb=1,
        on_gpu=machine.device.type == "cuda",
    )
    for (layer, module), weights in zip(modules.items(), layers, strict=True):
        local = HeterogeneousExperts(layer, machine)
        each = [ExpertWeights(*one) for one in zip(weights.gate_up, weights.down, strict=True)]
        hot = round(hot_share * len(each))
        local.adopt(
            {index: each[index].to(machine.device) for index in range(hot)},
            {index: each[index] for index in range(hot, len(each))},
        )
        module.remoe = LayerExperts(layer=layer, local=local, fan_out=None, meter=meter)  # type: ignore[arg-type]
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


@torch.inference_mode()
def check(
    results: Results,
    names: dict[str, Any],
    model: PreTrainedModel,
    layer: ExpertWeights,
    top_k: int,
) -> None:
    """Compare a layer with float32 on the device, by where its experts are made to go.

    Of bfloat16 the relative error is a few thousandths.
    """
    module = next(iter(experts_by_layer(model).values()))
    machine: Machine = module.remoe.local._machine  # type: ignore[union-attr]  # noqa: SLF001
    measured, device = machine.times, machine.device
    there = layer.to(device)
    ways = {
        "as placed": measured,
        "on the CPU": ExpertTimes([1], [0.0], [1.0], 1.0),
        "streamed": ExpertTimes([1], [9.0], [0.0], 1.0),
    }
    errors = {}
    for (way, times), tokens in itertools.product(ways.items(), (1, 3, 300)):
        hidden = torch.randn(tokens, there.down.shape[1], device=device).to(DTYPE)
        scores = torch.randn(tokens, len(there.down), device=device)
        gates, index = scores.softmax(-1).topk(top_k)
        machine.times = times
        got = module.remoe.forward(module, hidden, index, gates).float()  # type: ignore[union-attr]
        exact = torch.zeros_like(got)
        for expert in index.unique().tolist():
            rows, slots = (index == expert).nonzero(as_tuple=True)
            gate, up = (hidden[rows].float() @ there.gate_up[expert].float().T).chunk(2, -1)
            output = (functional.silu(gate) * up) @ there.down[expert].float().T
            exact.index_add_(0, rows, output * gates[rows, slots, None])
        error = float((got - exact).norm() / exact.norm())
        errors[way] = max(errors.get(way, 0.0), error)
    machine.times = measured
    results.add(**names, what="relative error", **errors, right=max(errors.values()) < 0.02)


def new_machine(pool: Any, device: torch.device) -> Machine:
    def nothing(_: object) -> Any:
        raise AssertionError("all experts are held")

    return Machine(nothing, pool, device=device, dtype=DTYPE, activation=SILU)


class _NoExperts:
    def forward(self, _module: object, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros_like(hidden)


@contextmanager
def stopwatches() -> Iterator[dict[str, list[float]]]:
    """Calls and seconds of the parts of a layer, as the host sees them."""
    watched: dict[str, list[float]] = {}

    def watch(owner: Any, name: str) -> Callable[[], None]:
        kept = owner.__dict__[name]
        inner = kept.__func__ if isinstance(kept, classmethod) else kept
        count = watched.setdefault(name, [0, 0.0])

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = inner(*given, **named)
            count[0] += 1
            count[1] += time.perf_counter() - began
            if name == "start":  # what it returns waits for the CPU
                return lambda: waited(result)
            return result

        def waited(wait: Callable[[], None]) -> None:
            began = time.perf_counter()
            wait()
            watched.setdefault("wait", [0, 0.0])[1] += time.perf_counter() - began

        setattr(owner, name, classmethod(timed) if isinstance(kept, classmethod) else timed)
        return lambda: setattr(owner, name, kept)

    parts = [
        (LayerExperts, "forward"),
        (Batch, "of"),
        (Machine, "place"),
        (Machine, "compute"),
        (Staging, "send"),
        (NativeKernel, "start"),
        (DeviceSum, "add"),
    ]
    undo = [watch(owner, name) for owner, name in parts]
    try:
        yield watched
    finally:
        for back in undo:
            back()


class Contenders:
    """One model's shapes, run by each in turn."""

    def __init__(
        self, name: str, args: argparse.Namespace, weights: Weights, results: Results
    ) -> None:
        self.name, self.args, self.weights, self.results = name, args, weights, results
        self.device = torch.device(args.device)
        config = shapes(name, tiny=args.tiny)
        self.model = build(config, self.device)
        self.default = self.model.config._experts_implementation  # noqa: SLF001
        self.modules = experts_by_layer(self.model)
        first = next(iter(self.modules.values()))
        experts, hidden, inner = first.down_proj.shape
        count = len(self.modules)
        self.layers = weights.layers(count, experts, inner, hidden)
        self.top_k = config.num_experts_per_tok
        expert_bytes = 3 * inner * hidden * 2
        self.numbers = count * experts * expert_bytes // 2
        self.token_bytes = count * self.top_k * expert_bytes
        results.add(
            model=name,
            what="model",
            layers=count,
            experts=experts,
            top_k=self.top_k,
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
            for spins in self.args.try_spins:
                for fewer in self.args.try_fewer:
                    attempt(lambda s=spins, f=fewer: self.tune(s, f))  # type: ignore[misc]
            pool = NativePool(threads=max(1, PROCESSORS - 1), spins=self.args.spins)
            attempt(lambda: self.remoe(pool))
            attempt(self.without_experts)
            attempt(self.all_on_gpu)
            pool.close()
        if not self.args.skip_cpu:
            attempt(self.all_on_cpu)

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
            self._measure("accelerate cpu_offload", 2)
        finally:
            for module in self.modules.values():
                remove_hook_from_module(module, recurse=True)

    def remoe(self, pool: NativePool) -> None:
        machine = new_machine(pool, self.device)
        for share in self.args.hot:
            use_remoe(self.model, machine, self.layers, share)
            if share == self.args.hot[0] and machine.times is not None:
                self.results.add(model=self.name, what="times", **asdict(machine.times))
            who = f"Remoe, {share:.0%} of experts on the GPU"
            names = {"model": self.name, "who": who}
            check(self.results, names, self.model, self.layers[0], self.top_k)
            self._measure(who, 3, machine)

    def tune(self, spins: int, fewer: int) -> None:
        """Decoding alone, with so many threads less than processors, and where its time goes."""
        threads = max(1, PROCESSORS - fewer)
        pool = NativePool(threads=threads, spins=spins)
        machine = new_machine(pool, self.device)
        use_remoe(self.model, machine, self.layers, 0.0)
        asking = Asking(self.model, self.device, 1.0)
        took = asking.decode_s()
        with stopwatches() as watched:
            asking.decode_s(12)
        calls = watched.pop("forward")
        self.results.add(
            model=self.name,
            what="tuning",
            spins=spins,
            threads=threads,
            tokens_per_s=1 / statistics.median(took),
            layer_us=round(calls[1] / calls[0] * 1e6),
            **{f"{k}_us": round(v[1] / calls[0] * 1e6) for k, v in watched.items()},
            cpu=machine.computed["cpu"] / sum(machine.computed.values()),
            times=asdict(machine.times) if machine.times else None,
        )
        pool.close()

    def without_experts(self) -> None:
        for module in self.modules.values():
            module.remoe = _NoExperts()
        self._measure("without experts", 1)

    def all_on_gpu(self) -> None:
        self.model.set_experts_implementation(self.default)
        set_experts(self.model, [one.to(self.device) for one in self.layers])
        try:
            self._measure(f"all on the GPU ({self.default})", 2)
        finally:
            set_experts(self.model, self.layers)

    def all_on_cpu(self) -> None:
        pool = NativePool(threads=PROCESSORS, spins=2000)
        machine = new_machine(pool, CPU)
        machine.times = ExpertTimes([1], [0.0], [1.0], 1.0)
        for module in self.modules.values():  # nothing of them is to be moved
            for name in ("gate_up_proj", "down_proj"):
                if hasattr(module, name):
                    delattr(module, name)
        self.model.to(CPU)
        use_remoe(self.model, machine, self.layers, 0.0)
        use_native_layers(self.model, pool)
        asking = Asking(self.model, CPU, min(2, self.args.limit), threads=PROCESSORS)
        self._measure("all on the CPU (Remoe)", 2, machine, asking)
        pool.close()

    def _measure(
        self, who: str, limit_s: float, machine: Machine | None = None, asking: Asking | None = None
    ) -> None:
        limit_s = min(limit_s, self.args.limit)
        measure(
            self.results,
            {"model": self.name, "who": who},
            asking or Asking(self.model, self.device, limit_s),
            machine,
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


def shapes(name: str, *, tiny: bool) -> Any:
    config = CONFIGS[name]()
    if tiny:
        for key, value in TINY.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def going_on(results: Results, name: str, step: Callable[[], None]) -> None:
    """Whatever fails is written down, and the next step is taken."""
    try:
        step()
    except Exception:  # noqa: BLE001
        results.add(model=name, what="failed", error=traceback.format_exc(limit=-4))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(results: Results) -> None:
    """Figures by contender, and what the targets ask for."""
    print("\n| model | | decode, tokens/s | of the floor | prefill, ms | on CPU / GPU / streamed |")
    print("|---|---|--:|--:|--:|--:|")
    floors = {r["model"]: r["floor_tokens_per_s"] for r in results.rows if r["what"] == "rates"}
    for name, who in dict.fromkeys((r["model"], r["who"]) for r in results.rows if "who" in r):
        rows = [r for r in results.rows if (r.get("model"), r.get("who")) == (name, who)]
        decode = next((r for r in rows if r["what"] == "decode"), None)
        prefill = [f"{r['seconds'] * 1e3:.0f}" for r in rows if r["what"].startswith("prefill")]
        speed = decode["tokens_per_s"] if decode else float("nan")
        kinds = ("share_cpu", "share_resident", "share_streamed")
        shares = [f"{decode[k]:.0%}" for k in kinds if k in decode] if decode else []
        of = f"{speed / floors[name]:.0%}" if name in floors and "Remoe" in who else ""
        cells = [name, who, f"{speed:.1f}", of, " / ".join(prefill), " / ".join(shares)]
        print("| " + " | ".join(cells) + " |", flush=True)


PROCESSORS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=190, help="end after about so long")
    parser.add_argument("--limit", type=float, default=4, help="seconds for one figure, at most")
    parser.add_argument("--hot", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--prefills", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--spins", type=int, default=2000)
    parser.add_argument("--try-spins", nargs="*", type=int, default=[])
    parser.add_argument("--try-fewer", nargs="*", type=int, default=[1])
    parser.add_argument("--skip-offload", action="store_true")
    parser.add_argument("--skip-cpu", action="store_true", help="not all on the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny layers: does it run at all?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out)
    torch.set_num_threads(1)  # beside the kernel's, as main_model_fn/native_threads.py does
    try:
        native_variants()
    except KernelUnavailableError:
        subprocess.run([sys.executable, "-m", "remoe.kernel.native.build"], check=True)
        native_library._open_library.cache_clear()  # noqa: SLF001
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, split_experts_forward)
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    results.add(
        what="machine",
        gpu=gpu,
        processors=PROCESSORS,
        torch=torch.__version__,
        transformers=transformers.__version__,
        accelerate=accelerate.__version__,
        kernel=native_variants()[0],
    )
    weights = Weights(1 << 25 if args.tiny else 31 << 30, device)
    for name in args.models:
        if time.perf_counter() - BEGAN > args.seconds - 10:
            break
        going_on(results, name, lambda: Contenders(name, args, weights, results).run())  # noqa: B023
    table(results)


if __name__ == "__main__":
    main()
