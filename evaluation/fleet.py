"""A fleet that serves one model at some rate: what is awake, and what it costs.

Expert functions hold some experts of one layer each (`experts_per_function`). Requests arrive as a
Poisson process. Each uses some experts of every layer; a function wakes at its first call and
sleeps `keep_alive_s` after its last. Above some rate nothing ever sleeps and capacity decides: then
a function has as many replicas as its busy share asks for. Memory is billed while it is awake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from evaluation.hosts import Host
from evaluation.shapes import Shape

__all__ = ["Fleet", "FleetFigures", "always_on", "simulate_fleet"]

_GB = 1e9
_UTILISATION = 0.7
_GPU_CARD_GB = 80.0
_MOST_BATCH = 256.0
_LEAST_FUNCTION_GB = 1.0  # and so 1 vCPU
_RUNTIME_GB = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How the model is cut, and for how long what was called stays awake. Shares of a layer's
    experts are drawn with `concentration`, `topics` different mixes of them. As many streams share a
    step as come, as long as a step takes `tpot_s` at most."""

    experts_per_function: int
    keep_alive_s: float = 60.0
    prompt_tokens: int = 1_155  # the means of Azure's conversation hour
    decode_tokens: int = 211
    concentration: float = 0.3
    topics: int = 8
    cpu_usd_per_gb_s: float = 2.3e-5
    gpu_price_ratio: float = 3.0
    tpot_s: float = 0.5

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.decode_tokens

    def function_gb(self, shape: Shape) -> float:
        """Memory of a function; it has a vCPU with each GB."""
        held_gb = self.experts_per_function * shape.expert_bytes / _GB + _RUNTIME_GB
        return max(_LEAST_FUNCTION_GB, held_gb)


class FleetFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the simulated time. `functions` is how many there are, `awake` of them at a time,
    `replicas` what runs. `usd_per_million_tokens` counts prompt and output tokens."""

    functions: int
    awake: float
    replicas: float
    main_replicas: float
    main_awake: float
    tpot_s: float
    usd_per_million_tokens: float


def simulate_fleet(
    host: Host, shape: Shape, fleet: Fleet, rate_rps: float, *, requests: int = 400, seed: int = 0
) -> FleetFigures:
    """Simulate `requests` arrivals; functions of all layers alike, so some layers stand for all."""
    chance = np.random.default_rng(seed)
    layers = min(shape.moe_layers, 4)
    stands_for = shape.moe_layers / layers
    per_layer = math.ceil(shape.experts / fleet.experts_per_function)
    mixes = chance.dirichlet(
        np.full(shape.experts, fleet.concentration), (fleet.topics, layers)
    )  # [topics, layers, experts]
    mean_shares = mixes.mean(axis=(0, 1))

    def pass_s(rows: float) -> float:
        return _pass_s(host, shape, fleet, rows, mean_shares)

    batch = shared_batch(pass_s, rate_rps, fleet)
    step_s, prompt_s = pass_s(batch), pass_s(fleet.prompt_tokens)
    service_s = prompt_s + fleet.decode_tokens * step_s
    arrivals = np.cumsum(chance.exponential(1 / rate_rps, requests))
    horizon_s = float(arrivals[-1]) + service_s + fleet.keep_alive_s
    topic = chance.integers(0, fleet.topics, requests)
    # The chance that a request uses a function at all: any of its tokens, any of its experts.
    function = np.arange(shape.experts) // fleet.experts_per_function
    by_function = np.stack(
        [mixes[..., function == index].sum(axis=-1) for index in range(per_layer)], axis=-1
    )  # [topics, layers, functions]
    used = 1 - (1 - by_function).clip(0, 1) ** (fleet.tokens * shape.top_k)
    touched = chance.random((requests, layers, per_layer)) < used[topic]
    awake_s = _awake_s(arrivals, touched, service_s, fleet.keep_alive_s)  # [layers, functions]
    busy = _busy_share(host, shape, fleet, rate_rps, batch=batch, shares=by_function.mean(axis=0))
    # What is awake has one replica, or as many as its work needs.
    share_awake = (awake_s / horizon_s).clip(0, 1)
    replicas = np.maximum(share_awake, np.where(busy > _UTILISATION, busy / _UTILISATION, 0))
    main_load = rate_rps * (fleet.decode_tokens * step_s / batch + prompt_s) / _UTILISATION
    main_awake_s = _awake_s(
        arrivals, np.ones((requests, 1, 1), np.bool_), service_s, fleet.keep_alive_s
    )
    main_awake = float((main_awake_s / horizon_s).clip(0, 1)[0, 0])
    main_replicas = max(main_awake, main_load if main_load > 1 else 0.0)
    expert_usd_per_s = (
        float(replicas.sum()) * stands_for * fleet.function_gb(shape) * fleet.cpu_usd_per_gb_s
    )
    main_gb = shape.non_expert_bytes / _GB + batch * fleet.tokens * shape.kv_bytes_per_token / _GB
    cards = math.ceil(main_gb / _GPU_CARD_GB)
    main_usd_per_s = (
        main_replicas * cards * _GPU_CARD_GB * fleet.gpu_price_ratio * fleet.cpu_usd_per_gb_s
    )
    return FleetFigures(
        functions=per_layer * shape.moe_layers,
        awake=float(share_awake.sum()) * stands_for,
        replicas=float(replicas.sum()) * stands_for,
        main_replicas=main_replicas,
        main_awake=main_awake,
        tpot_s=step_s,
        usd_per_million_tokens=(expert_usd_per_s + main_usd_per_s)
        / (rate_rps * fleet.tokens)
        * 1e6,
    )


def shared_batch(pass_s: Callable[[float], float], rate_rps: float, fleet: Fleet) -> float:
    """How many streams share a step, by Little's law: as many as arrive while they are written.

    At most so many that a step takes `tpot_s`, if one alone does not take longer; what is more
    goes to another main function.
    """
    most = _MOST_BATCH
    if pass_s(most) > fleet.tpot_s:
        most = _largest(lambda batch: pass_s(batch) <= fleet.tpot_s, 1.0, most)
    return _largest(
        lambda batch: rate_rps * fleet.decode_tokens * pass_s(batch) >= batch, 1.0, most
    )


def _largest(holds: Callable[[float], bool], least: float, most: float) -> float:
    """The largest value for which it holds, given that it does up to some value."""
    if not holds(least):
        return least
    if holds(most):
        return most
    for _ in range(30):
        middle = (least + most) / 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return least


def _pass_s(
    host: Host, shape: Shape, fleet: Fleet, rows: float, shares: NDArray[np.float64]
) -> float:
    """So many tokens through the model: the dense part on the GPU, and each layer's slowest function.

    A layer's functions are called at once; each computes what was routed to it one expert after
    another. `shares` are [experts], of a layer's routes.
    """
    routed = rows * shape.top_k * np.sort(shares)[::-1]  # the most used together: the slowest
    slowest = routed[: fleet.experts_per_function]
    used = 1 - np.exp(-slowest)
    one_s = host.expert_times(shape).seconds(np.maximum(slowest, 1.0), fleet.function_gb(shape))
    sent = min(rows, float(slowest.sum()))
    moved_s = 2 * 3 * shape.hidden * sent / host.network_bytes_per_s
    layer_s = host.invocation_s + moved_s + float(used @ one_s)
    moves_s = 2 * rows * host.move_s_per_token(shape)
    return host.gpu_dense_s(shape, rows) + shape.moe_layers * (layer_s + moves_s)


def _busy_share(
    host: Host,
    shape: Shape,
    fleet: Fleet,
    rate_rps: float,
    *,
    batch: float,
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    """How many replicas of each function are computing on average, [layers, functions].

    Decoding: each step of each main function calls with its batch's rows. Reading: prompts' rows.
    """
    times = host.expert_times(shape)
    steps_per_s = rate_rps * fleet.decode_tokens / batch
    per_expert = shares / fleet.experts_per_function  # of a layer's routes
    decode_rows = batch * shape.top_k * per_expert
    prompt_rows = fleet.prompt_tokens * shape.top_k * per_expert

    def call_s(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        chance = 1 - np.exp(-rows)
        one = times.seconds(np.maximum(rows, 1.0), fleet.function_gb(shape))
        busy: NDArray[np.float64] = fleet.experts_per_function * chance * one
        return busy

    found: NDArray[np.float64] = steps_per_s * call_s(decode_rows) + rate_rps * call_s(prompt_rows)
    return found


def _awake_s(
    arrivals: NDArray[np.float64],
    touched: NDArray[np.bool_],
    service_s: float,
    keep_alive_s: float,
) -> NDArray[np.float64]:
    """How long each function is awake: the union of its requests, each with the time after it.

    `touched` is [requests, layers, functions]; returns [layers, functions].
    """
    stays_s = service_s + keep_alive_s
    result = np.zeros(touched.shape[1:])
    for layer, function in np.ndindex(*result.shape):
        starts = arrivals[touched[:, layer, function]]
        if len(starts):
            result[layer, function] = np.minimum(np.diff(starts), stays_s).sum() + stays_s
    return result


class AlwaysOn(msgspec.Struct, frozen=True, kw_only=True):
    """The cheapest always-on deployment: `experts_on` the GPUs, or in a CPU host's memory."""

    experts_on: str
    replicas: int
    tpot_s: float
    usd_per_million_tokens: float


def always_on(host: Host, shape: Shape, fleet: Fleet, rate_rps: float) -> AlwaysOn:
    """Everything resident all the time, on whole cards or with the experts beside them on CPUs.

    The cheapest of those that hold `tpot_s`, if one does.
    """
    found = []
    for experts_on in ("GPU", "CPU"):

        def pass_s(rows: float, on: str = experts_on) -> float:
            return _whole_pass_s(host, shape, rows, on)

        batch = shared_batch(pass_s, rate_rps, fleet)
        step_s, prompt_s = pass_s(batch), pass_s(fleet.prompt_tokens)
        # A replica's time goes to steps and to prompts, one after another.
        busy = rate_rps * (fleet.decode_tokens * step_s / batch + prompt_s)
        replicas = max(1, math.ceil(busy / _UTILISATION))
        gpu_gb = (
            shape.non_expert_bytes / _GB + batch * fleet.tokens * shape.kv_bytes_per_token / _GB
        )
        cpu_gb = 0.0
        if experts_on == "GPU":
            gpu_gb += shape.experts_bytes / _GB
        else:
            cpu_gb = shape.experts_bytes / _GB
        cards = math.ceil(gpu_gb / _GPU_CARD_GB)
        usd_per_s = fleet.cpu_usd_per_gb_s * (fleet.gpu_price_ratio * cards * _GPU_CARD_GB + cpu_gb)
        found.append(
            AlwaysOn(
                experts_on=experts_on,
                replicas=replicas,
                tpot_s=step_s,
                usd_per_million_tokens=replicas * usd_per_s / (rate_rps * fleet.tokens) * 1e6,
            )
        )
    return min(found, key=lambda one: (one.tpot_s > fleet.tpot_s, one.usd_per_million_tokens))


def _whole_pass_s(host: Host, shape: Shape, rows: float, experts_on: str) -> float:
    """One pass of so many rows with every expert in one place."""
    routes = rows * shape.top_k
    active = shape.experts * (1 - math.exp(-routes / shape.experts))
    each = max(1.0, routes / active)
    if experts_on == "GPU":
        cards = math.ceil((shape.experts_bytes + shape.non_expert_bytes) / _GB / _GPU_CARD_GB)
        layer_s = active * host.gpu_expert_s(shape, each) / cards
    else:
        one_s = float(host.expert_times(shape).seconds(np.array([each]), float(host.cores))[0])
        layer_s = active * one_s + 2 * rows * host.move_s_per_token(shape)
    return host.gpu_dense_s(shape, rows) + shape.moe_layers * layer_s
