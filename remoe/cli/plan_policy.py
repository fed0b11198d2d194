"""What a policy would do with loads like a plan's: sentences for `remoe plan --policy`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remoe.moeless.function_balance import Policy
    from remoe.plan import Plan
    from remoe.topology import Topology

__all__ = ["policy_sentences"]


def policy_sentences(
    policy: Policy, plan: Plan, topology: Topology, *, streams: int, function_replicas: int = 1
) -> list[str]:
    """Residents, replicas and memory if `streams` such prompts were answered side by side.

    The step's loads are the plan's profile, which the joint policy starts from, and `moeless` sees
    in flight if the profile is right.
    """
    import numpy as np

    from remoe.checkpoint import Checkpoint
    from remoe.moeless.function_balance import BalanceRules, FunctionShare, balance_functions

    checkpoint = Checkpoint.open(Path(topology.model_dir))
    loads = np.asarray(plan.profile, np.float64) * checkpoint.top_k * streams
    functions = [FunctionShare.of(one) for one in topology.experts]
    planned = plan.partition
    rules = BalanceRules(
        expert_gb=checkpoint.expert_size_bytes / 1e9,
        room_gb=max(0.0, topology.main_memory_gb - plan.main_memory_gb),
        most_replicas=function_replicas,
    )
    balance = balance_functions(loads, planned, functions, rules)
    called = [
        one
        for one in functions
        if any(
            loads[layer, list(planned.remote[layer])].sum() > 0
            for layer in range(one.first_layer, one.last_layer + 1)
        )
    ]
    held_gb = sum(one.memory_gb for one in called)
    head = f"Policy {policy}, {streams} such prompts side by side: "
    if policy == "remoe":
        return [
            (
                f"{head}{len(called)} of {len(functions)} expert functions are called and hold "
                f"{held_gb:.2f} GB, a replica each; others are at zero."
            )
        ]
    moved = planned.remote_count - balance.partition.remote_count
    kept = {one.name: balance.replicas[one.name] for one in functions if balance.replicas[one.name]}
    kept_gb = sum(one.memory_gb * kept.get(one.name, 0) for one in functions)
    used = loads.sum(axis=1) > 0
    return [
        (
            f"{head}{moved} experts move into the main function, {moved * rules.expert_gb:.2f} GB of "
            f"the {rules.room_gb:.2f} GB it has room for."
        ),
        (
            f"Expert functions keep {sum(kept.values())} replicas and {kept_gb:.2f} GB, where the "
            f"policy remoe keeps {len(called)} and {held_gb:.2f} GB."
        ),
        (
            f"Loads of a layer vary by {balance.layer_cv[used].mean():.2f} (CV, the mean over layers) "
            f"with one replica an expert, by {balance.scaled_cv[used].mean():.2f} with the scaler's."
        ),
    ]
