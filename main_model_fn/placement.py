"""Where each of a layer's experts is computed so that the layer ends first: on the CPU or the GPU.

Fiddler's rule (arXiv 2402.07033, section 3.2) compares, expert by expert, computing on the CPU with
copying the weights to the GPU. Here all three resources work at once, so that what is compared is
when the last of them is done: the CPU, the link to the GPU, and the GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["Balance", "ExpertTimes", "Placement", "hottest", "place"]


@dataclass(frozen=True)
class ExpertTimes:
    """What one expert of a model was measured to take on a machine, in seconds.

    `cpu_s` and `gpu_s` are for `rows`, ascending; between them they are interpolated, and beyond
    the last they grow with the rows. `copy_s` is copying its weights to the GPU, `cpu_start_s`
    what using the CPU takes besides: rows there, sums back.
    """

    rows: Sequence[int]
    cpu_s: Sequence[float]
    gpu_s: Sequence[float]
    copy_s: float
    cpu_start_s: float = 0.0

    def cpu(self, rows: int) -> float:
        return _at(self._cpu, rows)

    def gpu(self, rows: int) -> float:
        return _at(self._gpu, rows)

    @cached_property
    def _cpu(self) -> list[float]:
        return self._table(self.cpu_s)

    @cached_property
    def _gpu(self) -> list[float]:
        return self._table(self.gpu_s)

    def _table(self, seconds: Sequence[float]) -> list[float]:
        """By rows, from 0 on; more rows never take less, whatever was measured."""
        grown = np.maximum.accumulate(np.array(seconds))
        table: list[float] = np.interp(range(self.rows[-1] + 1), self.rows, grown).tolist()
        return table


def _at(table: list[float], rows: int) -> float:
    last = len(table) - 1
    return table[rows] if rows <= last else table[last] * rows / last


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts by where they are computed; streamed ones in the order in which they are copied.

    `seconds` is when the last resource is done, as the times predict.
    """

    cpu: list[int]
    resident: list[int]
    streamed: list[int]
    seconds: float


def place(rows: Mapping[int, int], resident: Collection[int], times: ExpertTimes) -> Placement:
    """Place the experts of `rows`, by expert, of which the GPU holds the `resident` ones.

    Copies take the same time whatever an expert's rows, and computing on the CPU the longer the
    more there are: so those with the most rows are streamed, and only their number is sought. In
    that order they also pass the link and the GPU soonest (Johnson's rule for two machines, 1954).
    No other placement is faster by more than the GPU takes for the expert with the most rows.
    """
    here = [expert for expert in rows if expert in resident]
    others = sorted((e for e in rows if e not in resident), key=rows.__getitem__, reverse=True)
    gpu_end = sum(times.gpu(rows[expert]) for expert in here)
    cpu_s = [times.cpu(rows[expert]) for expert in others]
    cpu_end = sum(cpu_s) + times.cpu_start_s
    best, count = (max(gpu_end, cpu_end), 0) if others else (gpu_end, 0)
    for streamed, expert in enumerate(others, 1):
        gpu_end = max(gpu_end, streamed * times.copy_s) + times.gpu(rows[expert])
        cpu_end -= cpu_s[streamed - 1]
        end = gpu_end if streamed == len(others) else max(gpu_end, cpu_end)
        if end < best:
            best, count = end, streamed
        if gpu_end >= best:  # and only grows
            break
    return Placement(others[count:], here, others[:count], best)


class Balance:
    """What share of a decoding step's cold slices is streamed, learned from who was done last.

    Those that were streamed before they were asked for are not among them.

    Each step of so few rows is like the last one, so what was seen is worth more than any times
    measured before: CPU, link and GPU read the same memory, and a machine's rates change.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def place(self, rows: Mapping[int, int], resident: Collection[int]) -> Placement:
        """Place slices, those with the most rows on the GPU; `rows` is by slice."""
        here = [part for part in rows if part in resident]
        others = [part for part in rows if part not in resident]
        if len(others) < sum(rows[part] for part in others):
            others.sort(key=rows.__getitem__, reverse=True)
        count = round(self.share * len(others))
        return Placement(others[count:], here, others[:count], 0.0)

    def note(self, placed: Placement, *, gpu_first: bool) -> None:
        """Whether the GPU was done before the CPU: ten times in a row moves one slice."""
        cold = len(placed.cpu) + len(placed.streamed)
        if cold:
            step = (0.1 if gpu_first else -0.1) / cold
            self.share = min(1.0, max(0.0, self.share + step))


def hottest(
    profile: Mapping[int, Sequence[float]], local: Mapping[int, Collection[int]], count: int
) -> dict[int, frozenset[int]]:
    """The `count` experts of `local`, by layer, that are expected to be used most.

    `profile` is the share of each expert in its layer's routes, by layer: each layer has as many
    routes, so these serve the most. Equally hot ones are spread over the layers.
    """
    ranked = sorted(
        (-profile[layer][expert], expert, layer) for layer in local for expert in local[layer]
    )
    chosen = [(layer, expert) for _, expert, layer in ranked[:count]]
    return {layer: frozenset(e for where, e in chosen if where == layer) for layer in local}
