"""Replays batches against a policy: layer times, both costs, cold starts (B.2, B.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.moeless.hardware import ExpertMachine
from planner.moeless.policies import LayerView, Policy
from planner.moeless.residency import KEEP_ALIVE_S, LayerResidency
from planner.moeless.traffic import Batch, Step
from remoe.moeless.scaler import load_cv

__all__ = ["Outcome", "Setting", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`room` is how many replicas of a layer a GPU can hold; None is as many as come.

    `distance` is how many layers ahead loads are known, and replicas are started.
    """

    machine: ExpertMachine
    gpus: int
    distance: int = 1
    keep_alive_s: float = KEEP_ALIVE_S
    room: int | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Of one replay. Layer times are one a layer and step, with how many like it they stand for.

    Costs are in byte-seconds. `proxy` is the paper's: a serverless layer is charged while it runs,
    for its own replicas; a serverful policy, for all layers' experts. `executing` charges every
    policy as if it were serverless, so that it shows balance alone. `resident` is memory held, idle
    or not, from the first batch to the end of the last.
    """

    policy: str
    paper_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    serial_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    stall_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    weight: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    prefill: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    mean_replicas: float = 0.0
    mean_cv: float = 0.0
    cold_share: float = 0.0
    proxy: float = 0.0
    executing: float = 0.0
    resident: float = 0.0
    span_s: float = 0.0

    def mean(self, times: NDArray[np.float64], *, prefill: bool | None = None) -> float:
        """The weighted mean of a time, of all layers and steps or of one phase."""
        chosen = slice(None) if prefill is None else self.prefill == prefill
        weight = self.weight[chosen]
        return float((times[chosen] * weight).sum() / weight.sum())


def simulate(
    batches: Sequence[Batch],
    steps: Callable[[Batch], Sequence[Step]],
    policy: Policy,
    setting: Setting,
) -> Outcome:
    """Serve the batches one after another, each at the end of its second or when the last is done.

    The clock runs by the paper's layer times, plus what a layer waits for cold replicas.
    """
    run = _Run(policy, setting)
    for batch in batches:
        run.begin(batch.start_s)
        for step in steps(batch):
            run.step(step)
    return run.outcome()


class _Run:
    def __init__(self, policy: Policy, setting: Setting) -> None:
        self._policy = policy
        self._setting = setting
        self._machine = setting.machine
        self._layers: list[LayerResidency] = []
        self._previous = np.zeros((0, 0))  # loads of the pass before, [layers, experts]
        self._started_s: list[float] = []  # when each layer last began
        self._rows: list[tuple[float, float, float, float, bool]] = []
        self._replicas = self._cv = self._cold = self._placed = 0.0
        self._proxy = self._executing = 0.0
        self.now_s = 0.0
        self.begun_s: float | None = None

    def begin(self, start_s: float) -> None:
        self.now_s = max(self.now_s, start_s)
        if self.begun_s is None:
            self.begun_s = self.now_s
        self._started_s = [self.now_s] * len(self._layers)

    def step(self, step: Step) -> None:
        count = len(step.loads)
        if not self._layers:
            setting = self._setting
            self._layers = [
                LayerResidency(setting.gpus, keep_alive_s=setting.keep_alive_s, room=setting.room)
                for _ in range(count)
            ]
            self._started_s = [self.now_s] * count
            self._previous = np.ones_like(step.loads)
        for layer in range(count):
            self._layer(layer, step)
        self._previous = step.loads

    def _layer(self, layer: int, step: Step) -> None:
        residency, machine, setting = self._layers[layer], self._machine, self._setting
        # Known when `distance` layers before began; in the first layers, since the pass before, or
        # since the batch is there.
        known_s = self._started_s[layer - setting.distance if layer >= setting.distance else layer]
        view = LayerView(
            layer=layer,
            now_s=self.now_s,
            loads=step.loads[layer],
            predicted=step.predicted[layer],
            previous=self._previous[layer],
            warm=residency.warm(self.now_s),
        )
        placement, served = self._policy.place(view)
        cold = residency.use(placement, self.now_s) if self._policy.serverless else []
        stall_s = self._stall_s(cold, known_s)
        took = machine.layer_time(placement, served, gpus=setting.gpus)
        self._started_s[layer] = self.now_s
        self.now_s += (took.paper_s + machine.misc_s) * step.weight + stall_s
        replicas = len(placement.expert)
        held_bytes = (self._policy.held() or replicas) * machine.expert_bytes
        misc = machine.misc_s * machine.misc_bytes
        self._proxy += step.weight * (took.paper_s * held_bytes + misc)
        self._executing += step.weight * (took.paper_s * replicas * machine.expert_bytes + misc)
        self._replicas += step.weight * replicas
        self._cv += step.weight * load_cv(served, placement.replicas(len(served)))
        self._cold += len(cold)
        self._placed += step.weight * replicas
        row = (took.paper_s, took.serial_s, stall_s / step.weight, step.weight, step.prefill)
        self._rows.append(row)

    def _stall_s(self, cold: list[int], known_s: float) -> float:
        """How long the layer waits: a GPU's cold replicas come one after another."""
        if not cold:
            return 0.0
        busiest = int(np.bincount(cold).max())
        return max(0.0, busiest * self._machine.attach_s - (self.now_s - known_s))

    def outcome(self) -> Outcome:
        paper, serial, stall, weight, prefill = (
            np.array(column) for column in zip(*self._rows, strict=True)
        )
        total = float(weight.sum())
        span_s = self.now_s - (self.begun_s or 0.0)
        if self._policy.serverless:
            replica_s = sum(layer.until(self.now_s) for layer in self._layers)
        else:
            replica_s = self._policy.held() * span_s
        machine = self._machine
        return Outcome(
            policy=self._policy.name,
            paper_s=paper,
            serial_s=serial,
            stall_s=stall,
            weight=weight,
            prefill=prefill.astype(np.bool_),
            mean_replicas=self._replicas / total,
            mean_cv=self._cv / total,
            cold_share=self._cold / self._placed,
            proxy=self._proxy,
            executing=self._executing,
            resident=replica_s * machine.expert_bytes
            + span_s * machine.misc_bytes * len(self._layers),
            span_s=span_s,
        )
