"""MoEless' scaler and placer over Remoe's workers: the main function and the expert functions (ours).

A replica of an expert is in the main function, where it is resident, or in a replica of the
function that holds its layer. Which of them are to be there follows from the loads of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from remoe.experts import Partition
from remoe.moeless.scaler import CV_THRESHOLD, load_cv, scale
from remoe.topology import ExpertEndpoint

__all__ = [
    "Balance",
    "BalanceRules",
    "FunctionShare",
    "Policy",
    "balance_functions",
    "loaded_functions",
]

# remoe: the planner's partition, functions scaled by concurrency. moeless: loads foretold in
# flight. joint: those, seeded by what the planner foretells of each prompt.
Policy = Literal["remoe", "moeless", "joint"]


@dataclass(frozen=True, slots=True)
class FunctionShare:
    """An expert function: the layers it holds, and the memory that one replica of it holds."""

    name: str
    first_layer: int
    last_layer: int
    memory_gb: float

    @classmethod
    def of(cls, endpoint: ExpertEndpoint) -> FunctionShare:
        return cls(endpoint.name, endpoint.first_layer, endpoint.last_layer, endpoint.memory_gb)

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceRules:
    """`room_gb` is what the main function may hold beyond the plan; a GB there costs
    `main_price_ratio` times one in a function. `most_replicas` is of one function."""

    expert_gb: float
    room_gb: float
    main_price_ratio: float = 1.0
    most_replicas: int = 1
    cv_threshold: float = CV_THRESHOLD


@dataclass(frozen=True, slots=True)
class Balance:
    """What loads call for. `layer_cv` [layers] is that of expert loads with one replica each,
    `scaled_cv` with the scaler's; `replicas` are of each function, 0 where it may sleep."""

    partition: Partition
    replicas: dict[str, int]
    layer_cv: NDArray[np.float64]
    scaled_cv: NDArray[np.float64]


def balance_functions(
    loads: NDArray[np.float64],
    planned: Partition,
    functions: Sequence[FunctionShare],
    rules: BalanceRules,
    *,
    held: Partition | None = None,
) -> Balance:
    """Decide residents and replicas for `loads`, the routes a step expects: [layers, experts].

    The scaler gives each layer's experts replicas, none to those without load. A function whose
    remote experts have no load gets no replica: it goes to zero. One that is called holds its
    memory all the time; where its remote experts cost no more in the main function, and find
    room there, they are placed there, the most loaded functions first, and it goes to zero too.
    Others get as many replicas as their most replicated expert.

    Warm first: what `held` has resident beyond the plan stays while there is no load, so that a
    pause costs no reading. Without any load at all everything is as planned.
    """
    replicas, layer_cv, scaled_cv = _scale_layers(loads, rules)
    remote_load = {one.name: _remote_load(loads, planned, one) for one in functions}
    room_gb = rules.room_gb
    resident: set[str] = set()
    wanted: dict[str, int] = {}
    for one in sorted(functions, key=lambda f: -remote_load[f.name]):
        size_gb = _remote_count(planned, one) * rules.expert_gb
        loaded = remote_load[one.name] > 0
        warm = held is not None and bool(loads.any()) and _remote_count(held, one) == 0
        wanted[one.name] = _function_replicas(replicas, planned, one, rules) if loaded else 0
        pays = size_gb * rules.main_price_ratio <= one.memory_gb * max(1, wanted[one.name])
        if size_gb and (loaded or warm) and pays and size_gb <= room_gb:
            resident.add(one.name)
            wanted[one.name] = 0
            room_gb -= size_gb
    remote = list(planned.remote)
    for one in functions:
        if one.name in resident:
            for layer in one.layers:
                remote[layer] = ()
    return Balance(Partition(planned.experts, tuple(remote)), wanted, layer_cv, scaled_cv)


def loaded_functions(
    loads: NDArray[np.float64], planned: Partition, functions: Sequence[FunctionShare]
) -> list[str]:
    """The functions that a step is expected to call at all."""
    return [one.name for one in functions if _remote_load(loads, planned, one) > 0]


def _scale_layers(
    loads: NDArray[np.float64], rules: BalanceRules
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    layers, experts = loads.shape
    replicas = np.zeros((layers, experts), np.intp)
    before, after = np.zeros(layers), np.zeros(layers)
    for layer in range(layers):
        own = loads[layer]
        replicas[layer] = scale(
            own, most_added=experts, cv_threshold=rules.cv_threshold, scale_to_zero=True
        )
        before[layer] = load_cv(own, (own > 0).astype(np.intp))
        after[layer] = load_cv(own, replicas[layer])
    return replicas, before, after


def _remote_load(loads: NDArray[np.float64], planned: Partition, one: FunctionShare) -> float:
    return float(sum(loads[layer, list(planned.remote[layer])].sum() for layer in one.layers))


def _remote_count(partition: Partition, one: FunctionShare) -> int:
    return sum(len(partition.remote[layer]) for layer in one.layers)


def _function_replicas(
    replicas: NDArray[np.intp], planned: Partition, one: FunctionShare, rules: BalanceRules
) -> int:
    most = max(
        int(replicas[layer, list(planned.remote[layer])].max(initial=0)) for layer in one.layers
    )
    return min(max(1, most), rules.most_replicas)
