"""How long the tree takes to build, and a query to find similar prompts, against other ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import faiss
import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.baselines import FixedTreeSearch
from planner.clustering import pam
from planner.prompt_tree import ALPHA, PromptTree
from planner.routing_fit import RoutingFit

__all__ = ["Search", "build_pam_s", "build_tree_s", "search_times"]

_LISTS = 1024


def build_tree_s(points: NDArray[np.float32]) -> float:
    """The shortest of three."""
    return min(_seconds(lambda: PromptTree(points)) for _ in range(3))


def build_pam_s(points: NDArray[np.float32]) -> float:
    return _seconds(lambda: PromptTree(points, clustering=pam))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """Median time of a query, and which of the true nearest 15 it finds."""

    name: str
    median_ms: float
    recall: float


def search_times(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], fit: RoutingFit
) -> list[Search]:
    """Each way to search `vectors` for every query, one after another on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return _search_times(vectors, queries, fit)
    finally:
        faiss.omp_set_num_threads(threads)


def _search_times(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], fit: RoutingFit
) -> list[Search]:
    truth = faiss.knn(queries, vectors, ALPHA, metric=faiss.METRIC_INNER_PRODUCT)[1]
    learned, asked = fit.project(vectors), fit.project(queries)
    own = faiss.knn(asked, learned, ALPHA, metric=faiss.METRIC_INNER_PRODUCT)[1]
    tree = FixedTreeSearch(vectors, PromptTree(vectors))
    printed = replace(tree, leaves=1)

    def by_numpy(query: NDArray[np.float32]) -> NDArray[np.intp]:
        similarity = vectors @ query
        best = np.argpartition(-similarity, ALPHA)[:ALPHA]
        return best[np.argsort(-similarity[best])]

    def flat(among: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.intp]:
        found: NDArray[np.intp] = faiss.knn(
            query[None], among, ALPHA, metric=faiss.METRIC_INNER_PRODUCT
        )[1][0]
        return found

    ways: dict[str, tuple[Callable[[int], NDArray[np.intp]], NDArray[np.intp]]] = {
        "numpy, exact": (lambda row: by_numpy(queries[row]), truth),
        "FAISS flat, exact (BF)": (lambda row: flat(vectors, queries[row]), truth),
        "the tree (SPS)": (lambda row: tree.nearest(queries[row], ALPHA)[0], truth),
        "the tree as printed: one leaf": (
            lambda row: printed.nearest(queries[row], ALPHA)[0],
            truth,
        ),
    }
    if len(vectors) >= 80 * _LISTS:  # fewer would not train so many lists
        coarse = faiss.IndexFlatIP(vectors.shape[1])
        inverted = faiss.IndexIVFFlat(coarse, vectors.shape[1], _LISTS, faiss.METRIC_INNER_PRODUCT)
        inverted.train(vectors[::2])
        inverted.add(vectors)
        inverted.nprobe = 16
        ways["FAISS IVF, 16 of 1,024 lists"] = (
            lambda row: inverted.search(queries[row][None], ALPHA)[1][0],
            truth,
        )
    ways["learned similarity, FAISS flat (default)"] = (
        lambda row: flat(learned, asked[row]),
        own,
    )
    results = []
    for name, (search, expected) in ways.items():
        times, hits = [], 0
        for row in range(len(queries)):
            start = time.perf_counter()
            found = search(row)
            times.append(time.perf_counter() - start)
            hits += len(set(found.tolist()) & set(expected[row].tolist()))
        results.append(
            Search(
                name=name,
                median_ms=float(np.median(times)) * 1e3,
                recall=hits / expected.size,
            )
        )
    return results
