"""Batches as the paper makes them: requests of one second together, with the trace's lengths.

A batch is read in one pass and decoded until its longest answer is done. A request's tokens take
the routes of a prompt's tokens in turn, and begin again when those are used up.

See papers.md B.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.moeless.token_routes import Routes, TokenRoutes

__all__ = ["Batch", "Request", "Step", "make_batches", "steps_of"]


@dataclass(frozen=True, slots=True)
class Request:
    prompt: int  # whose routes it takes
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    start_s: float  # the end of the second its requests arrived in
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass over the model: true and predicted loads, both [layers, experts].

    A step stands for `weight` like it. The first `distance` layers of `predicted` are empty.
    """

    loads: NDArray[np.float64]
    predicted: NDArray[np.float64]
    weight: float
    prefill: bool


def make_batches(
    arrivals: Iterable[tuple[float, int, int]],
    prompts: Sequence[int],
    *,
    seed: int = 0,
) -> list[Batch]:
    """Batch (arrival_s, prompt tokens, output tokens) by the second; `prompts` are drawn from."""
    random = np.random.default_rng(seed)
    by_second: dict[int, list[Request]] = {}
    for arrival_s, prompt_tokens, output_tokens in arrivals:
        request = Request(int(random.choice(prompts)), prompt_tokens, output_tokens)
        by_second.setdefault(int(arrival_s), []).append(request)
    return [Batch(second + 1.0, by_second[second]) for second in sorted(by_second)]


def steps_of(
    batch: Batch, tokens: TokenRoutes, *, distance: int, stride: int = 1
) -> Iterator[Step]:
    """The prefill, and every `stride`-th decode step with that weight."""
    first = np.searchsorted(tokens.prompt, np.arange(tokens.prompt[-1] + 2))
    longest = max(request.output_tokens for request in batch.requests) - 1
    # The prefill gives the first token of the answer.
    chosen = np.arange(0, longest, stride)
    count = 1 + len(chosen)
    rows: list[NDArray[np.intp]] = []
    steps: list[NDArray[np.intp]] = []
    repeats: list[NDArray[np.float64]] = []
    for request in batch.requests:
        start, end = first[request.prompt], first[request.prompt + 1]
        read = int((~tokens.decoded[start:end]).sum())
        whole, rest = divmod(request.prompt_tokens, read)
        rows.append(np.arange(start, start + read))
        repeats.append(whole + (np.arange(read) < rest).astype(np.float64))
        steps.append(np.zeros(read, np.intp))
        mine = chosen[chosen < request.output_tokens - 1]
        answered = end - start - read
        # A prompt that was answered with nothing goes on as its last token read.
        decoded = start + read + mine % answered if answered else np.full(len(mine), end - 1)
        rows.append(decoded)
        repeats.append(np.ones(len(mine)))
        steps.append(1 + np.arange(len(mine)))
    where = np.concatenate(rows), np.concatenate(steps), np.concatenate(repeats)
    loads = _loads(tokens.routes, where, count, tokens.experts)
    predicted = _loads(tokens.predicted[distance], where, count, tokens.experts)
    predicted[:, :distance] = 0
    for step in range(count):
        weight = 1.0 if step == 0 else float(min(stride, longest - chosen[step - 1]))
        yield Step(loads[step], predicted[step], weight, prefill=step == 0)


def _loads(
    routes: Routes,
    where: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]],
    steps: int,
    experts: int,
) -> NDArray[np.float64]:
    """Sum tokens' routes by step: [steps, layers, experts]."""
    rows, step, repeats = where
    layers, top_k = routes.shape[1:]
    cell = (step[:, None] * layers + np.arange(layers))[:, :, None] * experts + routes[rows]
    weights = np.repeat(repeats, layers * top_k)
    flat = np.bincount(cell.ravel(), weights, steps * layers * experts)
    return flat.reshape(steps, layers, experts).astype(np.float64)
