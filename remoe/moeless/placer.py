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
    share = loads / np.maximum(replicas, 1)
    order = np.argsort(-share, kind="stable")
    gpu_load = [0.0] * gpus
    # A GPU's entry may lag behind its load, which only grows: it is put right when it comes up.
    heap = [(0.0, gpu) for gpu in range(gpus) if left[gpu] > 0]
    chosen: list[int] = []
    for expert, load, count in zip(
        order.tolist(), share[order].tolist(), replicas[order].tolist(), strict=True
    ):
        free = warm_gpus.get(expert)
        for _ in range(count):
            gpu = _least_loaded(free, gpu_load, left, limit - load) if free else None
            if gpu is not None and free:
                free.remove(gpu)
            else:
                while heap[0][0] != gpu_load[heap[0][1]] or left[heap[0][1]] == 0:
                    behind = heap[0][1]
                    if left[behind] == 0:
                        heapq.heappop(heap)
                    else:
                        heapq.heapreplace(heap, (gpu_load[behind], behind))
                gpu = heap[0][1]
            gpu_load[gpu] += load
            left[gpu] -= 1
            chosen.append(gpu)
    experts = np.repeat(order, replicas[order])
    return Placement.of(experts, np.array(chosen, np.intp), gpus)


def _least_loaded(
    candidates: list[int], gpu_load: list[float], left: list[int], limit: float
) -> int | None:
    """The candidate of least load with room that is not above `limit`, if there is one."""
    best, least = None, limit
    for gpu in candidates:
        load = gpu_load[gpu]
        if left[gpu] > 0 and (load < least or (load == least and (best is None or gpu < best))):
            best, least = gpu, load
    return best


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
