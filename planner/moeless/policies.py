"""Who decides replicas and their places before a layer runs: MoEless, and what it is compared with.

See papers.md B.4, B.5, B.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.baselines import expert_parallel, oracle_loads
from remoe.moeless.eplb import eplb
from remoe.moeless.placement import Placement
from remoe.moeless.placer import attach_missing, place
from remoe.moeless.scaler import CV_THRESHOLD, scale

__all__ = ["Eplb", "ExpertParallel", "LayerView", "Moeless", "MoelessKnobs", "Oracle", "Policy"]

Loads = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerView:
    """What can be known when a layer's decision falls, and its true `loads`, [experts].

    `predicted` is what a predictor says, `previous` the layer's loads one pass before; `warm` are
    the replicas that are alive.
    """

    layer: int
    now_s: float
    loads: Loads
    predicted: Loads
    previous: Loads
    warm: Placement


class Policy(Protocol):
    """`serverless` replicas live for their keep-alive; the others hold memory all the time."""

    name: str
    serverless: bool

    def place(self, view: LayerView) -> tuple[Placement, Loads]:
        """The placement, and the loads that are served: the true ones unless the policy is lossy."""

    def held(self) -> int:
        """How many replicas of all layers are held all the time; 0 if serverless."""


class ExpertParallel:
    """Plain expert parallelism (Megatron-LM)."""

    name, serverless = "expert parallel", False

    def __init__(self, *, layers: int, experts: int, gpus: int) -> None:
        self._placement = expert_parallel(experts, gpus)
        self._held = layers * experts

    def place(self, view: LayerView) -> tuple[Placement, Loads]:
        return self._placement, view.loads

    def held(self) -> int:
        return self._held


class Oracle(ExpertParallel):
    """Disregards the router and spreads tokens evenly; a bound that changes the model's answers."""

    name = "oracle (lossy)"

    def place(self, view: LayerView) -> tuple[Placement, Loads]:
        return self._placement, oracle_loads(view.loads)


class Eplb:
    """DeepSeek's balancer, run again every `period_s` over the loads since it ran last.

    It begins with the loads of `history`, [layers, experts], as if it had run for long.
    """

    name, serverless = "EPLB", False

    def __init__(
        self, history: Loads, *, gpus: int, redundant: int, period_s: float = 600.0
    ) -> None:
        experts = int(history.shape[1])
        self._slots = -(-(experts + redundant) // gpus) * gpus
        self._gpus = gpus
        self._period_s = period_s
        self._next_s = period_s
        self._seen = np.zeros_like(history)
        self._placements = self._balance(history)

    def _balance(self, loads: Loads) -> list[Placement]:
        return [eplb(layer, slots=self._slots, gpus=self._gpus) for layer in loads]

    def place(self, view: LayerView) -> tuple[Placement, Loads]:
        if view.now_s >= self._next_s and view.layer == 0:
            self._placements = self._balance(self._seen)
            self._seen[:] = 0
            self._next_s += self._period_s * (1 + (view.now_s - self._next_s) // self._period_s)
        self._seen[view.layer] += view.loads
        return self._placements[view.layer], view.loads

    def held(self) -> int:
        return self._slots * len(self._placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoelessKnobs:
    """MoEless' settings, and its parts, each of which can be taken out for an ablation.

    Without the predictor, `history` stands for every prediction. Without the scaler each expert
    has one replica. Without the placer replicas go to GPUs in turn, whatever is warm or loaded.

    `prior_routes` (ours) adds so many routes, spread as `history` has it, to each prediction: a
    decode step has few routes, and one that was foretold wrongly outweighs what is known for long.
    """

    gpus: int
    most_added: int
    cv_threshold: float = CV_THRESHOLD
    room: Sequence[int] | None = None
    warm_slack: float | None = None
    scale_to_zero: bool = False
    split_above: float = 0.0
    prior_routes: float = 0.0
    predictor: bool = True
    scaler: bool = True
    placer: bool = True


class Moeless:
    """Predict, scale, place: the paper's three parts."""

    name, serverless = "MoEless", True

    def __init__(self, history: Loads, knobs: MoelessKnobs) -> None:
        self._history = history
        self._knobs = knobs

    def place(self, view: LayerView) -> tuple[Placement, Loads]:
        knobs = self._knobs
        expected = self._expected(view)
        if knobs.scaler:
            replicas = scale(
                expected,
                most_added=knobs.most_added,
                cv_threshold=knobs.cv_threshold,
                scale_to_zero=knobs.scale_to_zero,
                split_above=knobs.split_above,
            )
        else:
            replicas = np.ones(len(expected), np.intp)
        if knobs.placer:
            placement = place(
                expected,
                replicas,
                knobs.gpus,
                warm=view.warm,
                room=knobs.room,
                warm_slack=knobs.warm_slack,
            )
        else:
            expert = np.repeat(np.arange(len(replicas)), replicas)
            placement = Placement(expert, np.arange(len(expert)) % knobs.gpus, knobs.gpus)
        return attach_missing(placement, view.loads, warm=view.warm), view.loads

    def _expected(self, view: LayerView) -> Loads:
        if not self._knobs.predictor:
            history: Loads = self._history[view.layer]
            return history
        # The first layers have no prediction: the pass before stands for it (B.3).
        expected = view.predicted if view.predicted.any() else view.previous
        share = self._history[view.layer] / self._history[view.layer].sum()
        mixed: Loads = expected + self._knobs.prior_routes * share
        return mixed

    def held(self) -> int:
        return 0
