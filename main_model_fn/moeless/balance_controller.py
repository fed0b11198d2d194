"""Acts on the loads: which experts are resident, how many replicas functions keep, by policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from main_model_fn.live_partition import LivePartition
from main_model_fn.moeless.load_book import LoadBook
from main_model_fn.moeless.runtime_control import RuntimeControl
from remoe.balance_report import BalanceReport
from remoe.errors import CheckpointError
from remoe.experts import Partition
from remoe.moeless.function_balance import (
    Balance,
    BalanceRules,
    FunctionShare,
    Policy,
    balance_functions,
)

__all__ = ["BalanceController"]

_log = structlog.get_logger()
_LEAST_STEPS = 2  # looked at, before loads seen in flight mean anything
_KEEP_ALIVE_S = 60.0  # without a request, before the plan's partition is back
_ASK_EVERY_S = 10.0  # a wish for replicas holds three times as long


class BalanceController:
    """A thread that decides every `period_s`, or at once when a request brings its prediction.

    The planner's partition is the base: what loads add is resident beyond it, and goes again when
    nobody has asked for `keep_alive_s`.
    """

    def __init__(
        self,
        partition: LivePartition,
        book: LoadBook,
        *,
        policy: Policy,
        functions: Sequence[FunctionShare],
        rules: BalanceRules,
        runtime: RuntimeControl,
        on_change: Callable[[str], None] = lambda _text: None,
        period_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._partition = partition
        self._book = book
        self._policy = policy
        self._functions = tuple(functions)
        self._rules = rules
        self._runtime = runtime
        self._on_change = on_change
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._planned = partition.deployment
        self._ours = partition.deployment
        self._seeds: dict[str, NDArray[np.float64]] = {}
        self._as_planned: set[str] = set()
        self._open = 0
        self._seeded_at_step = 0
        self._last_open_at = clock()
        self._replicas: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}
        self._balance: Balance | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="balance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def opened(
        self,
        request_id: str,
        profile: list[list[float]] | None,
        routes: int,
        *,
        policy: Policy | None = None,
    ) -> None:
        """A request begins; `profile` [layers][experts] is the planner's, `routes` its top-k.

        In joint mode it seeds the loads: of each token `routes` go to a layer, spread like that.
        While the planner would serve all who are here by the policy `remoe`, nothing is moved.
        """
        with self._lock:
            self._open += 1
            if self._policy == "joint" and policy == "remoe":
                self._as_planned.add(request_id)
            elif self._policy == "joint" and profile:
                self._seeds[request_id] = np.asarray(profile, np.float64) * routes
                self._seeded_at_step = self._book.view().steps
                self._wake.set()

    def closed(self, request_id: str) -> None:
        with self._lock:
            self._open -= 1
            self._seeds.pop(request_id, None)
            self._as_planned.discard(request_id)
            self._last_open_at = self._clock()

    def report(self) -> BalanceReport | None:
        """What loads were and what was made of them; None before anything was decided."""
        balance, view = self._balance, self._book.view()
        if balance is None:
            return None
        planned, now = self._planned.partition, self._ours.partition
        return BalanceReport(
            policy=self._policy,
            layer_cv=[round(float(value), 4) for value in balance.layer_cv],
            scaled_cv=[round(float(value), 4) for value in balance.scaled_cv],
            overlap=[None if np.isnan(v) else round(float(v), 4) for v in view.overlap],
            replicas=dict(balance.replicas),
            attached=planned.remote_count - now.remote_count,
        )

    def decide(self) -> None:
        """Look at the loads once, and act where they call for something else than there is."""
        with self._lock:
            if self._partition.deployment is not self._ours:  # the planner has changed its mind
                self._planned = self._ours = self._partition.deployment
            loads = self._expected()
            moves = not self._open or len(self._as_planned) < self._open
        if loads is None:
            return
        balance = balance_functions(
            loads,
            self._planned.partition,
            self._functions,
            self._rules,
            held=self._ours.partition,
        )
        if not moves:
            self._balance = replace(balance, partition=self._ours.partition, replicas={})
            self._replicas = {}
            return
        self._balance = balance
        self._hold(balance.partition)
        self._scale(balance.replicas)

    def _expected(self) -> NDArray[np.float64] | None:
        """Routes of a step by expert; nothing at all after a long silence, None if not known."""
        if not self._open:
            silent_s = self._clock() - self._last_open_at
            view = self._book.view()
            return np.zeros_like(view.loads) if silent_s >= _KEEP_ALIVE_S else None
        view = self._book.view()
        seen = view.steps - self._seeded_at_step
        if self._seeds and seen < _LEAST_STEPS:
            # What is in flight says nothing yet of who has just come.
            seeds: NDArray[np.float64] = np.stack(list(self._seeds.values())).sum(axis=0)
            known = view.steps >= _LEAST_STEPS
            return np.where(view.loads > seeds, view.loads, seeds) if known else seeds
        return view.loads if view.steps >= _LEAST_STEPS else None

    def _hold(self, wanted: Partition) -> None:
        if wanted == self._ours.partition:
            return
        extra = self._planned.partition.remote_count - wanted.remote_count
        memory_gb = self._planned.main_memory_gb + extra * self._rules.expert_gb
        deployment = msgspec.structs.replace(
            self._planned, partition=wanted, main_memory_gb=memory_gb
        )
        try:
            change = self._partition.change(deployment)
        except CheckpointError as error:
            _log.error("balance_not_possible", reason=error.message)
            return
        with self._lock:
            self._ours = deployment
        _log.info("experts_balanced", attached=change.attached, detached=change.detached)
        self._on_change(f"{extra} experts beyond the plan" if extra else "")

    def _scale(self, replicas: dict[str, int]) -> None:
        """Say what changed, and again from time to time what should stay."""
        now = self._clock()
        for name, count in replicas.items():
            changed = self._replicas.get(name) != count
            due = now - self._asked_at.get(name, -_ASK_EVERY_S) >= _ASK_EVERY_S
            if changed or (count and due):
                self._asked_at[name] = now
                self._runtime.scale(name, count, for_s=3 * _ASK_EVERY_S)
        self._replicas = dict(replicas)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._period_s)
            self._wake.clear()
            if not self._stopping:
                self.decide()
