"""The host's memory: a block of random weights, and how fast it is read and copied to the GPU."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.heterogeneous.shapes import DTYPE
from main_model_fn.host_memory import host_empty, pin, unpin
from main_model_fn.streaming import ExpertWeights

__all__ = ["PROCESSORS", "Weights", "rates", "wait"]

PROCESSORS = len(os.sched_getaffinity(0))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Weights:
    """One block of random numbers in the host's memory, of which every model takes its experts."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._device = device
        self.block = host_empty((size_bytes // 2,), DTYPE, pinned=False)
        self.filled = 0
        self._pinned = False

    def fill(self, numbers: int) -> None:
        """With the same 0.5 GB again and again, which no cache holds."""
        piece = torch.empty(min(numbers, 1 << 28), dtype=DTYPE, device=self._device)
        piece.normal_(0, 0.02)
        piece = piece.cpu()
        torch.set_num_threads(PROCESSORS)
        while self.filled < numbers:
            count = min(len(piece), numbers - self.filled)
            self.block[self.filled : self.filled + count].copy_(piece[:count])
            self.filled += count
        torch.set_num_threads(1)

    @contextmanager
    def pinned(self, numbers: int) -> Iterator[bool]:
        done = self._device.type == "cuda" and pin(self.block[:numbers])
        try:
            yield done
        finally:
            if done:
                wait(self._device)
                unpin(self.block)

    def experts(
        self, layers: int, experts: int, inner: int, hidden: int, slices: int
    ) -> list[list[ExpertWeights]]:
        """The same memory as each layer's experts, one after another, as Remoe holds them."""
        size = ExpertWeights.size(inner, hidden)
        self.fill(layers * experts * size)
        each = self.block[: layers * experts * size].view(layers, experts, size)
        return [
            [ExpertWeights.within(one, inner, hidden, slices=slices) for one in layer]
            for layer in each
        ]

    def layers(self, count: int, experts: int, inner: int, hidden: int) -> list[ExpertWeights]:
        """Each with all of its experts: [experts, 2 x inner, hidden] and [experts, hidden, inner]."""
        each = experts * 3 * inner * hidden
        self.fill(count * each)
        parts = (self.block[i * each : (i + 1) * each] for i in range(count))
        up = experts * 2 * inner * hidden
        return [
            ExpertWeights(
                part[:up].view(experts, 2 * inner, hidden), part[up:].view(experts, hidden, inner)
            )
            for part in parts
        ]


def rates(weights: Weights, numbers: int, device: torch.device) -> dict[str, float]:
    """GB/s at which all processors read, and pinned memory reaches the GPU: alone, and together."""
    block = weights.block[: min(numbers, 1 << 31)]
    parts = [part.view(torch.int64).numpy() for part in block.chunk(PROCESSORS)]
    there = torch.empty(1 << 28, dtype=DTYPE, device=device)[: len(block)]
    copied = len(there) * 2

    def read() -> float:
        readers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return len(block) * 2 / 1e9 / (time.perf_counter() - began)

    def copy(times: int) -> float:
        wait(device)
        began = time.perf_counter()
        for _ in range(times):
            there.copy_(block[: len(there)], non_blocking=True)
        wait(device)
        return times * copied / 1e9 / (time.perf_counter() - began)

    alone = max(read() for _ in range(3))
    link = max(copy(2) for _ in range(3))
    found = dict[str, float]()
    copies = max(2, round(3 * len(block) * 2 / alone * link / copied))
    beside = threading.Thread(target=lambda: found.update(link=copy(copies)))
    beside.start()
    together = statistics.median(read() for _ in range(2))
    beside.join()
    return {"cpu": alone, "link": link, "cpu_together": together, "link_together": found["link"]}
