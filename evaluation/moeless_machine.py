"""The constants of MoEless' formulas (B.2) on this machine: an expert's start and rows, a row's way."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import numpy as np
from numpy.typing import NDArray

from planner.moeless.hardware import fit_line
from remoe.checkpoint import Checkpoint
from remoe.experts import ExpertId
from remoe.kernel.interface import RoutedRows, open_kernel

__all__ = ["ROWS", "expert_seconds", "route_seconds"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def expert_seconds(checkpoint: Checkpoint, repeats: int = 12) -> NDArray[np.float64]:
    """The least time of one expert for each of ROWS, another expert in each call, one thread."""
    kernel = open_kernel(checkpoint.expert, "auto", activation=checkpoint.activation, threads=1)
    turns = itertools.cycle(
        [
            ExpertId(layer, index)
            for layer in checkpoint.moe_layers
            for index in range(checkpoint.experts)
        ][:128]
    )
    best = []
    for rows in ROWS:
        x = np.full((rows, checkpoint.hidden_size), 0.01, np.float32)
        call = RoutedRows(x, [0, rows], np.arange(rows, dtype="<i4"), np.ones(rows, "<f4"))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            kernel.weighted_sum([next(turns)], call)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return np.array(best)


def route_seconds(row_bytes: int, repeats: int = 30) -> float:
    """What one more row adds to a message through a local socket, one way."""
    sizes = np.array([16, 64, 256]) * row_bytes
    ours, theirs = socket.socketpair()
    total = int(sizes.sum()) * repeats

    def drain() -> None:
        left, buffer = total, bytearray(1 << 20)
        while left:
            left -= theirs.recv_into(buffer)

    reader = threading.Thread(target=drain)
    reader.start()
    best = []
    for size in sizes.tolist():
        message, times = bytes(size), []
        for _ in range(repeats):
            start = time.perf_counter()
            ours.sendall(message)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    reader.join()
    ours.close()
    theirs.close()
    return fit_line(sizes / row_bytes, np.array(best))[1]
