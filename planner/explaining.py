"""Why a plan is as it is, and what changes from one to another: numbers first, then sentences.

Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.model import ModelFacts
from planner.optimise.cost_baselines import Baseline
from planner.phases import PhaseProfiles
from planner.plan_making import Question
from planner.policy_forecasts import beyond_slo
from planner.remote_calls import remote_call_chance
from planner.selection import remote_mask
from remoe.plan import Plan
from remoe.planning_messages import (
    BaselineCost,
    Explanation,
    LayerExplanation,
    PlanDiff,
    RemoteExpert,
    ValueChange,
)
from remoe.topology import ExpertEndpoint

__all__ = ["PlanRecord", "diff", "explain"]


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan and what it was made from."""

    plan: Plan
    question: Question


def explain(
    record: PlanRecord,
    model: ModelFacts,
    functions: Sequence[ExpertEndpoint],
    others: Sequence[Baseline],
) -> Explanation:
    """Take a plan apart, layer by layer."""
    plan, question = record.plan, record.question
    workload = question.workload
    return Explanation(
        plan=plan,
        prompt_tokens=workload.prompt_tokens,
        decode_tokens=workload.decode_tokens,
        origin_of_partition="this request" if question.partition is None else "deployed",
        neighbours=plan.neighbours,
        layers=_layers(plan, question, model, functions),
        baselines=[
            BaselineCost(
                name=b.name,
                ttft_s=b.ttft_s,
                tpot_s=b.tpot_s,
                cost_usd=b.cost_usd,
                assumes=b.assumes,
            )
            for b in others
        ],
        why=_sentences(plan, question, model, others),
    )


def _layers(
    plan: Plan, question: Question, model: ModelFacts, functions: Sequence[ExpertEndpoint]
) -> list[LayerExplanation]:
    profiles: PhaseProfiles = question.profiles
    workload = question.workload
    routes = profiles.expected_routes(workload.prompt_tokens, workload.decode_tokens, model.top_k)
    chance = remote_call_chance(profiles.decode.shares, remote_mask(plan.partition), model.top_k)
    result = []
    for layer in model.moe_layers:
        of_layer = routes[layer]
        rank = np.empty(model.experts, np.intp)
        rank[np.argsort(-of_layer, kind="stable")] = np.arange(1, model.experts + 1)
        local = of_layer[list(plan.partition.local(layer))]
        holder = next((f for f in functions if f.first_layer <= layer <= f.last_layer), None)
        result.append(
            LayerExplanation(
                layer=layer,
                function=None if holder is None else holder.name,
                prefill_shares=_rounded(profiles.prefill.shares[layer]),
                decode_shares=_rounded(profiles.decode.shares[layer]),
                remote=[
                    RemoteExpert(
                        expert=expert,
                        expected_routes=round(float(of_layer[expert]), 3),
                        rank=int(rank[expert]),
                    )
                    for expert in plan.partition.remote[layer]
                ],
                least_used_local_routes=round(float(local.min()), 3) if len(local) else None,
                call_chance=round(float(chance[layer]), 6),
            )
        )
    return result


def _rounded(shares: np.typing.NDArray[np.float32]) -> list[float]:
    return np.round(shares.astype(np.float64), 6).tolist()  # type: ignore[no-any-return]


def _sentences(
    plan: Plan, question: Question, model: ModelFacts, others: Sequence[Baseline]
) -> list[str]:
    remote, total = plan.partition.remote_count, model.expert_count
    used_least = (
        f"{remote} of {total} experts are remote: in each layer those expected to be used least "
        f"by {question.workload.prompt_tokens} tokens read and "
        f"{question.workload.decode_tokens:.0f} written."
    )
    why = [used_least]
    if question.partition is not None:
        why[0] = (
            f"{remote} of {total} experts are remote, because the running main function "
            "has this partition."
        )
    elif plan.cost_split is None:
        why.append(
            f"The ratio {question.ratio:g} is the setting's: there is no hardware profile to "
            "choose by. `remoe profile hardware` makes one."
        )
    elif question.rule in {"cost", "per-layer"}:
        why.append(
            f"Of all ratios up to {question.ratio:g}, the limit of the deployed functions, this "
            "has the least predicted cost"
            + (" within the SLO." if question.slo is not None else ".")
        )
    if plan.neighbours:
        best = plan.neighbours[0]
        why.append(
            f"The profile is predicted from {len(plan.neighbours)} similar prompts, the nearest of "
            f"topic {best.topic} with similarity {best.similarity:.3f}."
        )
    else:
        why.append("There is no history yet, so every expert is taken to be used alike.")
    if plan.needed is not None:
        why.append(
            f"No plan holds the SLO: the least that one can promise is TTFT {plan.needed.ttft_s:.3f}"
            f" s or TPOT {plan.needed.tpot_s:.4f} s."
        )
    if plan.policy is not None:
        chosen = next(one for one in plan.policies if one.policy == plan.policy)
        most = max(one.resident_usd for one in plan.policies)
        least = "comes nearest to the SLO"
        if not beyond_slo(chosen, question.slo):
            least = "costs least" + (" within the SLO" if question.slo is not None else "")
        why.append(
            f"Beside others like it, the policy {plan.policy} {least}: all memory held counted, it "
            f"costs {1 - chosen.resident_usd / most:.1%} less than the dearest."
        )
    for other in others:
        if other.name == "MIX" and plan.predicted_cost_usd is not None:
            saved = 1 - plan.predicted_cost_usd / other.cost_usd
            why.append(
                f"Against keeping every expert in the main function (MIX), the plan costs "
                f"{abs(saved):.1%} {'less' if saved >= 0 else 'more'}."
            )
    return why


def diff(before: Plan, after: Plan) -> PlanDiff:
    """Compare two plans of one model."""
    were = set(before.partition.remote_ids())
    are = set(after.partition.remote_ids())
    memory = [{f.name: f.memory_gb for f in plan.functions} for plan in (before, after)]
    return PlanDiff(
        before=before.plan_id,
        after=after.plan_id,
        becomes_remote=[(expert.layer, expert.index) for expert in sorted(are - were)],
        becomes_local=[(expert.layer, expert.index) for expert in sorted(were - are)],
        main_memory_gb=_change(before.main_memory_gb, after.main_memory_gb),
        ttft_s=_change(before.predicted_ttft_s, after.predicted_ttft_s),
        tpot_s=_change(before.predicted_tpot_s, after.predicted_tpot_s),
        cost_usd=_change(before.predicted_cost_usd, after.predicted_cost_usd),
        functions={
            name: _change(memory[0].get(name), memory[1].get(name))
            for name in sorted({*memory[0], *memory[1]})
        },
    )


def _change(before: float | None, after: float | None) -> ValueChange:
    change = None if before is None or after is None else after - before
    return ValueChange(before=before, after=after, change=change)
