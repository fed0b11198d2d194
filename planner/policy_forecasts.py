"""What a request takes under each policy, and which of them the planner would have (ours).

Policies matter where requests are served side by side, so a token's time is that of a step with a
row for each of them. They differ in what is held while nobody computes on it, which the papers'
formula does not see: the choice is by the memory held, priced.

Ours, beyond papers.md B.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from planner.forecast import Workload
from planner.optimise.whole_plan import WholePlan
from planner.phases import PhaseProfiles
from planner.plan_making import Decisions, Optimising, Question
from remoe.experts import Partition
from remoe.moeless.function_balance import (
    BalanceRules,
    FunctionShare,
    Policy,
    balance_functions,
    loaded_functions,
)
from remoe.plan import PolicyForecast, Slo

__all__ = ["PolicyForecaster", "beyond_slo", "choose_policy"]


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to serve. `step_s` is a step with a row for each stream, without calibration;
    `held_gb` is what the main function and the kept replicas hold, `usd_per_s` its price."""

    plan: WholePlan
    step_s: float
    held_gb: float
    main_usd_per_s: float
    usd_per_s: float
    moved_in: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyForecaster:
    """`most_main_gb` is what the main function may hold, `most_replicas` how many of one function
    there may be."""

    maker: Optimising
    functions: Sequence[FunctionShare]
    top_k: int
    expert_gb: float
    most_main_gb: float
    most_replicas: int

    def forecast(
        self, question: Question, planned: Decisions, streams: int
    ) -> list[PolicyForecast]:
        """One for each policy, for `streams` requests like this one side by side, all warm.

        `remoe` keeps the plan's partition, and a replica of each function that is called. `moeless`
        learns of a prompt while that is read: it is read as planned, and answered with the residents
        and replicas that the loads call for. `joint` has those from the first token on. Times are
        those of one replica of each function.
        """
        workload, partition = question.workload, planned.partition
        profile = question.profiles.mixed(workload.prompt_tokens, workload.decode_tokens)
        loads = profile.shares.astype(np.float64) * self.top_k * streams
        rules = BalanceRules(
            expert_gb=self.expert_gb,
            room_gb=max(0.0, self.most_main_gb - planned.main_memory_gb),
            most_replicas=self.most_replicas,
        )
        balance = balance_functions(loads, partition, self.functions, rules)
        called = dict.fromkeys(loaded_functions(loads, partition, self.functions), 1)
        asked = replace(question, main_memory_gb=planned.main_memory_gb)
        as_planned = self._way(asked, partition, called, streams, 0)
        moved_in = partition.remote_count - balance.partition.remote_count
        balanced = self._way(asked, balance.partition, balance.replicas, streams, moved_in)
        # Times of tokens are one stream's: what more of them took is in their calibration.
        learned = max(1.0, as_planned.plan.estimate.tpot_s / as_planned.step_s)
        ways: tuple[tuple[Policy, _Way, _Way], ...] = (
            ("remoe", as_planned, as_planned),
            ("moeless", as_planned, balanced),
            ("joint", balanced, balanced),
        )
        return [
            _forecast(policy, read, written, question, streams=streams, learned=learned)
            for policy, read, written in ways
        ]

    def _way(
        self,
        question: Question,
        partition: Partition,
        replicas: Mapping[str, int],
        streams: int,
        moved_in: int,
    ) -> _Way:
        plan, main_usd_per_s = self.maker.solve(replace(question, partition=partition))
        decode = question.profiles.decode
        step, _ = self.maker.solve(
            replace(
                question,
                profiles=PhaseProfiles(decode, decode),
                workload=Workload(streams, 0.0),
                partition=partition,
                drift=msgspec.structs.replace(question.drift, prefill_factor=1.0),
                slo=None,
            )
        )
        functions_gb = sum(one.memory_gb * replicas.get(one.name, 0) for one in self.functions)
        main_gb = (question.main_memory_gb or 0.0) + moved_in * self.expert_gb
        return _Way(
            plan,
            step.estimate.prefill_s,
            main_gb + functions_gb,
            main_usd_per_s,
            main_usd_per_s + functions_gb * question.prices.cpu_usd_per_gb_s,
            moved_in,
        )


def _forecast(
    policy: Policy, read: _Way, written: _Way, question: Question, *, streams: int, learned: float
) -> PolicyForecast:
    """A prompt read one way and answered another; streams share all seconds equally."""
    tokens = question.workload.decode_tokens
    first, after = read.plan.estimate, written.plan.estimate
    ttft_s, tpot_s = first.prefill_s, written.step_s * learned
    decode_s = tokens * tpot_s
    tail = written.plan.limit_tpot_s / after.tpot_s if tokens else 1.0
    busy_usd = (ttft_s * read.main_usd_per_s + decode_s * written.main_usd_per_s) / streams
    return PolicyForecast(
        policy=policy,
        ttft_s=ttft_s,
        tpot_s=tpot_s if tokens else None,
        slo_ttft_s=read.plan.limit_ttft_s,
        slo_tpot_s=tpot_s * tail if tokens else None,
        cost_usd=busy_usd + first.remote_prefill_usd + after.remote_decode_usd,
        resident_usd=(ttft_s * read.usd_per_s + decode_s * written.usd_per_s) / streams,
        held_gb=written.held_gb,
        moved_in=written.moved_in,
    )


def choose_policy(forecasts: Sequence[PolicyForecast], slo: Slo | None) -> Policy | None:
    """The one that costs least of those within the SLO, else the one least beyond it.

    None if there are no forecasts; of equals the first.
    """

    if not forecasts:
        return None
    return min(forecasts, key=lambda one: (beyond_slo(one, slo), one.resident_usd)).policy


def beyond_slo(forecast: PolicyForecast, slo: Slo | None) -> float:
    """By what share the worse of its times is over its limit; 0 within the SLO, or without one."""
    if slo is None:
        return 0.0
    tpot_s = forecast.slo_tpot_s or 0.0
    return max(0.0, forecast.slo_ttft_s / slo.ttft_s - 1, tpot_s / slo.tpot_s - 1)
