"""The default deployment: gateway, planner, main-model function, and expert functions by layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from knative.policy import AUTOSCALING
from knative.spec import MAX_NAME_LENGTH, FunctionSpec
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError
from remoe.kernel.native_library import native_problem
from remoe.moeless.function_balance import Policy
from remoe.topology import ExpertEndpoint, Topology

__all__ = ["Deployment", "DeploymentOptions", "default_deployment", "model_name"]

# What prompts have activated, in the model's folder; `remoe profile activations` writes it.
HISTORY = "history.npz"

_MIB = 1 << 20
_RUNTIME_MIB = {"gateway": 512, "planner": 768, "main": 1280, "expert": 96}
_KV_TOKENS = 16_384  # what the main function's key-value cache holds
_MOST_REPLICAS = 2  # of an expert function
_WIDENING = 2  # bytes in memory per stored byte where bfloat16 becomes float32


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentOptions:
    """What a user may choose. Durations are Knative's (`60s`); `threads` is cores to use;
    `burst_capacity` is an expert function's `target-burst-capacity`; `history_dir` is where the
    planner keeps what it observes, nowhere unless given."""

    model_dir: Path
    threads: int
    port: int = 8000
    layers_per_function: int = 5
    window: str = "60s"
    burst_capacity: int = 0
    main_retention: str = "10m"
    main_memory_mib: int | None = None
    remote_ratio: float = 0.5
    dtype: str = "auto"
    device: str = "auto"
    log_level: str = "info"
    host: str = "127.0.0.1"
    # The gateway's settings, by variable; `prices` is the gateway's and the planner's.
    gateway_env: Mapping[str, str] = field(default_factory=dict)
    prices: str | None = None
    history_dir: Path | None = None
    policy: Policy = "remoe"
    hardware: Path | None = None
    """The hardware profile that the planner optimises with."""
    adapt_every_s: float | None = None
    """How often the planner reviews the running partition, 0 for never; its own default if None."""
    exact_ratio: bool = False
    """Whether every plan has just `remote_ratio`, so that the main function's memory is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Functions, and how they find each other once each has its URL."""

    model: str
    model_dir: Path
    gateway: FunctionSpec
    planner: FunctionSpec
    main: FunctionSpec
    experts: tuple[FunctionSpec, ...]
    # First and last layer of each expert function, in the order of `experts`.
    layer_ranges: tuple[tuple[int, int], ...]
    port: int
    host: str = "127.0.0.1"

    @property
    def scheme(self) -> str:
        return "https" if "REMOE_GATEWAY_TLS_CERT" in self.gateway.env else "http"

    @property
    def functions(self) -> tuple[FunctionSpec, ...]:
        return (self.gateway, self.planner, self.main, *self.experts)

    def topology(self, urls: Mapping[str, str]) -> Topology:
        """The file every service reads; `urls` is by function name."""
        return Topology(
            model=self.model,
            model_dir=str(self.model_dir),
            gateway_url=urls[self.gateway.name],
            planner_url=urls[self.planner.name],
            main_url=urls[self.main.name],
            main_memory_gb=_gb(self.main.memory_mib),
            experts=[
                ExpertEndpoint(
                    name=spec.name,
                    url=urls[spec.name],
                    first_layer=first,
                    last_layer=last,
                    memory_gb=_gb(spec.memory_mib),
                )
                for spec, (first, last) in zip(self.experts, self.layer_ranges, strict=True)
            ],
        )


def default_deployment(options: DeploymentOptions) -> Deployment:
    """Plan the functions for a checkpoint; raises CheckpointError or SettingsError."""
    checkpoint = Checkpoint.open(options.model_dir)
    per_function = options.layers_per_function
    if per_function < 1:
        raise SettingsError(f"an expert function holds at least 1 layer, not {per_function}")
    model = model_name(options.model_dir)
    ranges = tuple(
        (layers[0], layers[-1]) for layers in _in_groups(checkpoint.moe_layers, per_function)
    )
    common = {"REMOE_LOG_LEVEL": options.log_level}
    prices = {} if options.prices is None else {"REMOE_PRICES": options.prices}
    deployment = Deployment(
        model=model,
        model_dir=options.model_dir,
        gateway=FunctionSpec(
            name="gateway",
            module="gateway",
            holds="OpenAI API",
            env={
                **common,
                **prices,
                **options.gateway_env,
                "REMOE_GATEWAY_POLICY": options.policy,
            },
            timeout_s=600,
            memory_mib=_RUNTIME_MIB["gateway"],
            annotations=_always_on(),
            public=True,
        ),
        planner=FunctionSpec(
            name="planner",
            module="planner",
            holds="prediction, plans",
            env={**common, **prices, **_planner_env(options)},
            memory_mib=_RUNTIME_MIB["planner"],
            annotations=_always_on(),
        ),
        main=_main(options, checkpoint, model, common),
        experts=tuple(_experts(options, checkpoint, model, span, common) for span in ranges),
        layer_ranges=ranges,
        port=options.port,
        host=options.host,
    )
    for spec in deployment.functions:
        spec.policy()  # every annotation is checked before anything starts
    return deployment


def _in_groups(layers: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def _planner_env(options: DeploymentOptions) -> dict[str, str]:
    env = {
        "REMOE_PLANNER_REMOTE_RATIO": f"{options.remote_ratio:g}",
        "REMOE_PLANNER_EXPERT_EXPANSION": str(_expert_expansion()),
        "REMOE_PLANNER_FUNCTION_REPLICAS": str(_function_replicas(options)),
    }
    if options.hardware is not None:
        env["REMOE_PLANNER_HARDWARE"] = str(options.hardware)
        env["REMOE_PLANNER_FUNCTION_VCPUS"] = str(_expert_cpu(options))
    if options.exact_ratio:
        env["REMOE_PLANNER_RATIO_RULE"] = "fixed"
    if options.adapt_every_s is not None:
        env["REMOE_PLANNER_ADAPT_EVERY_S"] = f"{options.adapt_every_s:g}"
    history = options.model_dir / HISTORY
    if history.exists():
        env["REMOE_PLANNER_HISTORY"] = str(history)
    if options.history_dir is not None:
        env["REMOE_PLANNER_HISTORY_DIR"] = str(options.history_dir)
    return env


def _expert_cpu(options: DeploymentOptions) -> int:
    return max(1, options.threads // 2)


def _function_replicas(options: DeploymentOptions) -> int:
    """As many as have cores of their own, beside one for the main function; see `_experts`."""
    return max(1, min(_MOST_REPLICAS, (options.threads - 1) // _expert_cpu(options)))


def _expert_expansion() -> int:
    """Compiled experts compute on the mapped weights; numpy, where none could be, widens them."""
    return 1 if native_problem() is None else _WIDENING


def _main(
    options: DeploymentOptions, checkpoint: Checkpoint, model: str, common: dict[str, str]
) -> FunctionSpec:
    weights = checkpoint.non_expert_size_bytes
    weights += _resident_experts(options, checkpoint) * checkpoint.expert_size_bytes
    widening = _WIDENING if options.dtype == "float32" else 1
    needed_mib = _RUNTIME_MIB["main"] + math.ceil(
        (weights * widening + _KV_TOKENS * checkpoint.kv_bytes_per_token * widening) / _MIB
    )
    return FunctionSpec(
        name=_named(model, "main"),
        module="main_model_fn",
        holds="dense part, local experts",
        env={
            **common,
            "REMOE_MAIN_DTYPE": options.dtype,
            "REMOE_MAIN_POLICY": options.policy,
            "REMOE_MAIN_FUNCTION_REPLICAS": str(_function_replicas(options)),
            "REMOE_MAIN_DEVICE": options.device,
        },
        timeout_s=600,
        cpu=options.threads,
        memory_mib=options.main_memory_mib or needed_mib,
        annotations={
            AUTOSCALING + "initial-scale": "1",
            AUTOSCALING + "min-scale": "0",
            AUTOSCALING + "max-scale": "1",
            AUTOSCALING + "target-burst-capacity": "0",
            AUTOSCALING + "scale-to-zero-pod-retention-period": options.main_retention,
        },
    )


def _resident_experts(options: DeploymentOptions, checkpoint: Checkpoint) -> int:
    """The most experts that the main function is ever told to hold."""
    if not options.exact_ratio:
        return checkpoint.expert_count
    # Without a planner it keeps half of each layer.
    remote = math.floor(checkpoint.experts * min(options.remote_ratio, 0.5))
    return len(checkpoint.moe_layers) * (checkpoint.experts - remote)


def _experts(
    options: DeploymentOptions,
    checkpoint: Checkpoint,
    model: str,
    span: tuple[int, int],
    common: dict[str, str],
) -> FunctionSpec:
    first, last = span
    layer_count = sum(first <= layer <= last for layer in checkpoint.moe_layers)
    count = layer_count * checkpoint.experts
    # What a plan may send here: the remote experts, not all that the function could compute.
    remote = layer_count * math.ceil(checkpoint.experts * options.remote_ratio)
    weights_mib = math.ceil(remote * checkpoint.expert_size_bytes * _expert_expansion() / _MIB)
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    return FunctionSpec(
        name=_named(model, f"experts-l{first:02d}-l{last:02d}"),
        module="expert_fn",
        holds=f"{layers}, {count} experts",
        env={
            **common,
            "REMOE_EXPERT_FIRST_LAYER": str(first),
            "REMOE_EXPERT_LAST_LAYER": str(last),
            "REMOE_EXPERT_THREADS": str(_expert_cpu(options)),
        },
        timeout_s=60,
        cpu=_expert_cpu(options),
        memory_mib=_RUNTIME_MIB["expert"] + weights_mib,
        annotations={
            AUTOSCALING + "initial-scale": "0",
            AUTOSCALING + "min-scale": "0",
            AUTOSCALING + "max-scale": str(_MOST_REPLICAS),
            # One main function has one call in flight per function; a second replica is for a
            # second main function's worth of calls, not for the queue of one.
            AUTOSCALING + "target": "4",
            AUTOSCALING + "target-burst-capacity": str(options.burst_capacity),
            AUTOSCALING + "window": options.window,
        },
        local_socket=True,
    )


def _always_on() -> dict[str, str]:
    return {
        AUTOSCALING + "min-scale": "1",
        AUTOSCALING + "max-scale": "1",
        AUTOSCALING + "target-burst-capacity": "0",
    }


def model_name(model_dir: Path) -> str:
    """The builder's name for the model, the hub's of a downloaded one, or the folder's."""
    manifest = model_dir / "remoe.json"
    if manifest.exists():
        name = msgspec.json.decode(manifest.read_bytes()).get("name")
        if isinstance(name, str) and name:
            return name
    folder = model_dir.absolute()
    if folder.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _named(model: str, part: str) -> str:
    """A DNS label: the model's name, shortened if it must be, and the function's part."""
    label = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"m-{label}"
    return f"{label[: MAX_NAME_LENGTH - len(part) - 1].rstrip('-')}-{part}"


def _gb(mib: int) -> float:
    return mib * _MIB / 1e9
