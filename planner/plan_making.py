"""From a prediction to the decisions of a plan, by what has been measured.

Without a hardware profile the ratio is the setting's, memory the plain sum, and times are averages
of finished requests. With one, the optimisation decides (planner/optimise), and times come from
its model, calibrated by the same requests.

See papers.md A.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planner.calibration import Drift
from planner.forecast import FunctionLoad, Workload, forecast, function_loads
from planner.measurements import Measurements
from planner.memory import MemoryRule
from planner.model import ModelFacts
from planner.optimise.as_built import Demand
from planner.optimise.cost_baselines import Baseline, baselines
from planner.optimise.knapsack import choose
from planner.optimise.measured_system import (
    SystemRules,
    measured_system,
    measured_uncertainty,
)
from planner.optimise.milp import choose_by_milp
from planner.optimise.whole_plan import Limits, RatioRule, WholePlan, WholePlanner
from planner.phases import PhaseProfiles
from planner.selection import remote_mask, select_remote
from remoe.errors import InvalidRequestError
from remoe.experts import Partition
from remoe.hardware import HardwareProfile
from remoe.plan import CostSplit, FunctionForecast, PlanStatus, Slo
from remoe.prices import PriceBook
from remoe.topology import ExpertEndpoint

__all__ = ["Decisions", "FixedRatio", "Optimising", "PlanMaker", "Question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything a plan depends on. `partition` is one already decided; `asleep` means that the
    main function must start first."""

    profiles: PhaseProfiles
    workload: Workload
    longest_tokens: int
    slo: Slo | None
    prices: PriceBook
    measured: Measurements
    drift: Drift
    asleep: bool
    ratio: float
    rule: RatioRule
    robust: bool
    rules: SystemRules
    partition: Partition | None = None
    main_memory_gb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The part of a plan that is decided rather than predicted.

    `bare_*` are the model's times without calibration, None if no model gave them;
    `main_usd_per_s` is what the main function costs.
    """

    partition: Partition
    main_memory_gb: float
    functions: list[FunctionForecast]
    loads: list[FunctionLoad]
    ttft_s: float | None
    tpot_s: float | None
    cost_usd: float | None
    status: PlanStatus
    needed: Slo | None = None
    cost_split: CostSplit | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    bare_ttft_s: float | None = None
    bare_tpot_s: float | None = None
    main_usd_per_s: float | None = None


class PlanMaker(Protocol):
    def decide(self, question: Question) -> Decisions: ...

    def baselines(self, question: Question) -> list[Baseline]:
        """The same request served the paper's other ways; empty if that cannot be told."""
        ...


class FixedRatio:
    """The setting's ratio for every layer, and what requests have shown."""

    def __init__(
        self, model: ModelFacts, functions: Sequence[ExpertEndpoint], memory: MemoryRule
    ) -> None:
        self._model = model
        self._functions = functions
        self._memory = memory

    def decide(self, question: Question) -> Decisions:
        partition = question.partition
        if partition is None:
            workload = question.workload
            profile = question.profiles.mixed(workload.prompt_tokens, workload.decode_tokens)
            partition = select_remote(profile, question.ratio)
        main_gb = question.main_memory_gb
        if main_gb is None:
            tokens = min(question.longest_tokens, self._model.context_length)
            main_gb = self._memory.main_gb(partition, tokens)
        loads = function_loads(
            question.profiles, partition, self._functions, question.workload, self._model.top_k
        )
        expected = forecast(
            question.workload,
            loads,
            main_memory_gb=main_gb,
            measured=question.measured,
            prices=question.prices,
            slo=question.slo,
        )
        told = expected.ttft_s is not None or expected.tpot_s is not None
        status: PlanStatus = "unknown"
        if not expected.feasible:
            status = "infeasible"
        elif question.slo is not None and told:
            status = "feasible"
        return Decisions(
            partition=partition,
            main_memory_gb=main_gb,
            functions=[
                FunctionForecast(
                    name=load.function.name,
                    expected_routes=load.routes,
                    memory_gb=self._memory.expert_gb(partition, load.function),
                    replicas=1,
                    expected_calls=load.calls,
                )
                for load in loads
                if self._memory.remote_experts(partition, load.function)
            ],
            loads=loads,
            ttft_s=expected.ttft_s,
            tpot_s=expected.tpot_s,
            cost_usd=expected.cost_usd,
            status=status,
        )

    def baselines(self, question: Question) -> list[Baseline]:
        return []


class Optimising:
    """The optimisation of planner/optimise, on what `remoe profile hardware` measured."""

    def __init__(
        self,
        model: ModelFacts,
        functions: Sequence[ExpertEndpoint],
        memory: MemoryRule,
        hardware: HardwareProfile,
        *,
        gpu_speedup: float,
        by_milp: bool = False,
    ) -> None:
        self._model = model
        self._functions = functions
        self._memory = memory
        self._hardware = hardware
        self._gpu_speedup = gpu_speedup
        self._solver = choose_by_milp if by_milp else choose

    def decide(self, question: Question) -> Decisions:
        """Raises InvalidRequestError if nothing fits the functions' memory."""
        try:
            planner, bare = self._planner(question)
            plan = planner.plan(question.rule)
        except ValueError as error:
            raise InvalidRequestError(f"The request cannot be planned: {error}.") from error
        partition = question.partition or self._partition(plan)
        main_gb = question.main_memory_gb
        if main_gb is None:
            tokens = min(question.longest_tokens, self._model.context_length)
            main_gb = self._memory.main_gb(partition, tokens)
        loads = function_loads(
            question.profiles, partition, self._functions, question.workload, self._model.top_k
        )
        estimate = plan.estimate
        # Requests that share engine steps share the bill for them.
        cpu, gpu = question.measured.main_cpu_share, question.measured.main_gpu_share
        share = 1.0 if cpu is None or gpu is None else min(1.0, cpu + gpu)
        main_usd = estimate.main_usd * share
        split = CostSplit(
            main_usd=main_usd,
            remote_prefill_usd=estimate.remote_prefill_usd,
            remote_decode_usd=estimate.remote_decode_usd,
        )
        decodes = question.workload.decode_tokens > 0
        return Decisions(
            partition=partition,
            main_memory_gb=main_gb,
            functions=self._forecasts(planner, plan, partition, loads),
            loads=loads,
            ttft_s=estimate.prefill_s,
            tpot_s=estimate.tpot_s if decodes else None,
            cost_usd=split.main_usd + split.remote_prefill_usd + split.remote_decode_usd,
            status="feasible" if plan.feasible else "infeasible",
            needed=None if plan.feasible else Slo(*planner.fastest()),
            cost_split=split,
            slo_ttft_s=plan.limit_ttft_s,
            slo_tpot_s=plan.limit_tpot_s if decodes else None,
            bare_ttft_s=estimate.prefill_s / bare.prefill_factor,
            bare_tpot_s=estimate.tpot_s / bare.decode_factor if decodes else None,
            main_usd_per_s=planner.main_usd_per_s(plan),
        )

    def solve(self, question: Question) -> tuple[WholePlan, float]:
        """The whole plan, and what the main function costs a second under it, USD."""
        planner, _ = self._planner(question)
        plan = planner.plan(question.rule)
        return plan, planner.main_usd_per_s(plan)

    def baselines(self, question: Question) -> list[Baseline]:
        planner, _ = self._planner(question)
        found = baselines(planner.system, planner.outlook.demand, gpu_speedup=self._gpu_speedup)
        if question.prices.gpu_usd_per_gb_s is None:  # nobody can say what they would cost
            found = [one for one in found if one.name not in {"GPU", "Fetch"}]
        return found

    def _planner(self, question: Question) -> tuple[WholePlanner, Drift]:
        drift = question.drift
        system = measured_system(
            self._hardware, self._model, self._functions, question.prices, question.rules
        ).with_(prefill_factor=drift.prefill_factor, decode_factor=drift.decode_factor)
        uncertain = measured_uncertainty(
            self._hardware,
            asleep=question.asleep,
            prefill_tail=drift.prefill_tail,
            decode_tail=drift.decode_tail,
        )
        rows = list(self._model.moe_layers)
        workload = question.workload
        demand = Demand(
            question.profiles.prefill.shares[rows].astype(np.float64),
            question.profiles.decode.shares[rows].astype(np.float64),
            float(workload.prompt_tokens),
            workload.decode_tokens,
        )
        slo, system = question.slo, uncertain.expected(system)
        limits = Limits() if slo is None else Limits(slo.ttft_s, slo.tpot_s)
        most = int(question.ratio * self._model.experts + 1e-9)
        given = question.partition
        planner = WholePlanner(
            system,
            demand,
            limits=limits,
            slow=uncertain.slow(system) if question.robust else None,
            most_remote=most if self._functions else 0,
            remote=None if given is None else remote_mask(given)[rows],
            solver=self._solver,
        )
        return planner, drift

    def _partition(self, plan: WholePlan) -> Partition:
        remote: list[tuple[int, ...]] = [()] * self._model.layers
        for row, layer in enumerate(self._model.moe_layers):
            remote[layer] = tuple(np.flatnonzero(plan.remote[row]).tolist())
        return Partition(experts=self._model.experts, remote=tuple(remote))

    def _forecasts(
        self,
        planner: WholePlanner,
        plan: WholePlan,
        partition: Partition,
        loads: Sequence[FunctionLoad],
    ) -> list[FunctionForecast]:
        """One for each deployed function, or for each unit of a finer granularity in it."""
        specs, result = planner.system.remote, []
        for load in loads:
            if self._memory.remote_experts(partition, load.function) == 0:
                continue
            rows = [
                row
                for row, layer in enumerate(self._model.moe_layers)
                if load.function.first_layer <= layer <= load.function.last_layer
                and plan.counts[row] > 0
            ]
            spec = int(plan.specs[rows].max())
            result.append(
                FunctionForecast(
                    name=load.function.name,
                    expected_routes=load.routes,
                    memory_gb=float(specs.memory_gb[spec]),
                    replicas=int(plan.replicas[rows].max()),
                    expected_calls=load.calls,
                    vcpus=float(specs.vcpus[spec]),
                )
            )
        return result
