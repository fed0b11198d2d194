"""The Expert Placer: warm replicas stay, others join the least loaded GPU (Algorithm 2)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remoe.moeless.placement import Placement

__all__ = ["attach_missing", "fit_replicas", "place"]


def fit_replicas(
    loads: NDArray[np.float64], replicas: NDArray[np.intp], room: int
) -> NDArray[np.intp]:
    """Drop added replicas until `room` is enough for all, the least useful first (ours).

    That is the one whose loss leaves the smallest load on those that remain. Raises ValueError if
    there is not even room for one replica of each expert that has any.
    """
    excess = int(replicas.sum()) - room
    if excess <= 0:
        return replicas
    if np.count_nonzero(replicas) > room:
        raise ValueError(
            f"{np.count_nonzero(replicas)} experts do not fit room for {room} replicas; "
            "add GPUs, or memory for experts on them"
        )
    fitted = replicas.copy()
    heap = [
        (float(load) / (count - 1), expert)
        for expert, (load, count) in enumerate(zip(loads, replicas.tolist(), strict=True))
        if count > 1
    ]
    heapq.heapify(heap)
    for _ in range(excess):
        _, expert = heap[0]
        fitted[expert] -= 1
        if fitted[expert] > 1:
            heapq.heapreplace(heap, (float(loads[expert]) / int(fitted[expert] - 1), expert))
        else:
            heapq.heappop(heap)
    return fitted


def place(
    loads: NDArray[np.float64],
    replicas: NDArray[np.intp],
    gpus: int,
    *,
    warm: Placement | None = None,
    room: Sequence[int] | None = None,
    warm_slack: float | None = None,
) -> Placement:
    """Place each expert's replicas: Algorithm 2; `loads` and `replicas` are [experts].

    The most loaded replica first. It goes where a replica of its expert is `warm` (each warm one
    serves once; the least loaded GPU of several), else to the least loaded GPU; among equals the
    lower index goes first.

    Ours, for what the paper asks of memory in its text alone: `room` is how many replicas each GPU
    can hold, [gpus], warm ones included; what does not fit is dropped as in `fit_replicas`, which
    may raise ValueError. `warm_slack` takes a warm place only while that GPU's load stays
    within 1 + `warm_slack` times the mean.
    """
    left = [len(loads) + int(replicas.sum())] * gpus if room is None else list(room)
    replicas = fit_replicas(loads, replicas, sum(left))
    warm_gpus = _warm_gpus(warm, gpus)
    limit = float("inf")
    if warm_slack is not None:
        limit = (1 + warm_slack) * float(loads[replicas > 0].sum()) / gpus
    share = (loads / np.maximum(replicas, 1)).tolist()
    counts = replicas.tolist()
    gpu_load = [0.0] * gpus
    heap = [(0.0, gpu) for gpu in range(gpus) if left[gpu] > 0]
    experts: list[int] = []
    chosen: list[int] = []
    for expert in sorted(range(len(share)), key=lambda index: (-share[index], index)):
        load = share[expert]
        for _ in range(counts[expert]):
            places = [
                (gpu_load[gpu], gpu)
                for gpu in warm_gpus.get(expert, ())
                if left[gpu] > 0 and gpu_load[gpu] + load <= limit
            ]
            if places:
                gpu = min(places)[1]
                warm_gpus[expert].remove(gpu)
            else:
                # Entries of GPUs that got a warm replica or filled up meanwhile are out of date.
                while heap[0][0] != gpu_load[heap[0][1]] or left[heap[0][1]] == 0:
                    heapq.heappop(heap)
                gpu = heap[0][1]
            gpu_load[gpu] += load
            left[gpu] -= 1
            heapq.heappush(heap, (gpu_load[gpu], gpu))
            experts.append(expert)
            chosen.append(gpu)
    return Placement.of(np.array(experts, np.intp), np.array(chosen, np.intp), gpus)


def attach_missing(
    placement: Placement, loads: NDArray[np.float64], *, warm: Placement | None = None
) -> Placement:
    """Give each expert that has load after all, but no replica, one (ours): nothing is ever lost.

    It goes where the expert is `warm`, else to the GPU with the fewest replicas.
    """
    counts = placement.replicas(len(loads))
    missing = np.flatnonzero((counts == 0) & (loads > 0)).tolist()
    if not missing:
        return placement
    warm_gpus = _warm_gpus(warm, placement.gpus)
    on_gpu = np.bincount(placement.gpu, minlength=placement.gpus)
    chosen = []
    for expert in missing:
        gpu = min(warm_gpus.get(expert, range(placement.gpus)), key=lambda gpu: on_gpu[gpu])
        on_gpu[gpu] += 1
        chosen.append(gpu)
    return Placement.of(
        np.concatenate([placement.expert, np.array(missing)]),
        np.concatenate([placement.gpu, np.array(chosen)]),
        placement.gpus,
    )


def _warm_gpus(warm: Placement | None, gpus: int) -> dict[int, list[int]]:
    """Where each expert's warm replicas are; those on GPUs that are gone do not count."""
    by_expert: dict[int, list[int]] = {}
    if warm is not None:
        for expert, gpu in zip(warm.expert.tolist(), warm.gpu.tolist(), strict=True):
            if gpu < gpus:
                by_expert.setdefault(expert, []).append(gpu)
    return by_expert
