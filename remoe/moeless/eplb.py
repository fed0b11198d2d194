"""DeepSeek's expert-parallel load balancer (EPLB), from its description: the periodic baseline.

From loads of the past it makes redundant experts and packs all onto GPUs, as many on each. Where
experts come in groups (a token's experts are of few groups), groups are first packed onto nodes,
so that a group's experts stay within one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement
from remoe.moeless.scaler import scale

__all__ = ["balanced_packing", "eplb"]


def balanced_packing(weights: NDArray[np.float64], packs: int) -> NDArray[np.intp]:
    """The pack of each item, [items]: as many items in each, the heaviest first to the lightest.

    Raises ValueError unless `packs` divides the number of items.
    """
    if len(weights) % packs:
        raise ValueError(f"{len(weights)} items cannot be packed evenly into {packs}")
    size = len(weights) // packs
    pack = np.empty(len(weights), np.intp)
    totals, filled = np.zeros(packs), np.zeros(packs, np.intp)
    for item in np.argsort(-weights, kind="stable"):
        chosen = int(np.where(filled < size, totals, np.inf).argmin())
        pack[item] = chosen
        totals[chosen] += weights[item]
        filled[chosen] += 1
    return pack


def eplb(
    loads: NDArray[np.float64], *, slots: int, gpus: int, groups: int = 1, nodes: int = 1
) -> Placement:
    """Place one layer's experts, `loads` [experts], on `slots` places over all GPUs.

    Redundant experts go one by one to the largest load a replica, the scaler without a threshold.
    With `groups` that fit the nodes (hierarchical, for prefill), each node replicates its own
    groups' experts onto its own GPUs; otherwise all are taken together. Raises ValueError if the
    slots are fewer than the experts, or do not divide evenly.
    """
    experts = len(loads)
    if slots < experts or slots % gpus:
        raise ValueError(
            f"{slots} slots do not do for {experts} experts on {gpus} GPUs: "
            "use a multiple of the GPUs, and no fewer than the experts"
        )
    if nodes == 1 or groups % nodes:
        return Placement.of(*_replicate_and_pack(loads, np.arange(experts), slots, gpus), gpus)
    if experts % groups or gpus % nodes:
        raise ValueError(f"{experts} experts must divide by {groups} groups, GPUs by {nodes} nodes")
    group_of = np.arange(experts) // (experts // groups)
    group_loads = loads.reshape(groups, -1).sum(axis=1)
    node_of = balanced_packing(group_loads, nodes)[group_of]  # [experts]
    parts = [
        _replicate_and_pack(loads, np.flatnonzero(node_of == node), slots // nodes, gpus // nodes)
        for node in range(nodes)
    ]
    return Placement.of(
        np.concatenate([expert for expert, _ in parts]),
        np.concatenate([node * (gpus // nodes) + gpu for node, (_, gpu) in enumerate(parts)]),
        gpus,
    )


def _replicate_and_pack(
    loads: NDArray[np.float64], members: NDArray[np.intp], slots: int, gpus: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The expert and the GPU of each replica of `members`, on one node."""
    # Without any load yet all experts are alike; the scaler would add none.
    own = loads[members] if loads[members].any() else np.ones(len(members))
    replicas = scale(own, most_added=slots - len(members), cv_threshold=None)
    expert = np.repeat(np.arange(len(members)), replicas)
    return members[expert], balanced_packing(own[expert] / replicas[expert], gpus)
