"""One function's experts of a layer, split over its replicas: longest processing time first.

papers.md A.12: the most costly expert goes to the least loaded replica, and so on; within
4/3 - 1/(3z) of the best split. An expert that alone costs more than a replica's fair share is cut
by rows first, which the paper, whose experts are whole, cannot do.
"""

from __future__ import annotations

import heapq
import math
from itertools import pairwise

from main_model_fn.routes import Route

__all__ = ["SPLIT_FROM_ROUTES", "expert_cost", "split_over_replicas"]

# Fewer routes (rows times experts) than this are not worth another call, even where each replica
# has cores of its own (docs/adr/0002-expert-protocol.md).
SPLIT_FROM_ROUTES = 64
# Reading an expert's weights takes as long as computing so many rows on weights just read
# (docs/adr/0006-native-experts.md: 444 us at one row, 4767 us at 256).
_READING_ROWS = 24


def expert_cost(rows: int) -> int:
    """What `rows` rows of one expert cost, in rows' worth of computing."""
    return _READING_ROWS + rows


def split_over_replicas(routes: dict[int, Route], replicas: int) -> list[dict[int, Route]]:
    """Routes by expert for each replica that gets any, which are at most `replicas`."""
    fair = sum(expert_cost(len(route.tokens)) for route in routes.values()) / replicas
    pieces = [
        (expert, piece) for expert, route in routes.items() for piece in _cut(route, fair, replicas)
    ]
    pieces.sort(key=lambda piece: -len(piece[1].tokens))
    shares: list[dict[int, Route]] = [{} for _ in range(replicas)]
    loads = [(0, replica) for replica in range(replicas)]
    for expert, piece in pieces:
        load, replica = heapq.heappop(loads)
        share = shares[replica]
        share[expert] = share[expert].and_also(piece) if expert in share else piece
        heapq.heappush(loads, (load + expert_cost(len(piece.tokens)), replica))
    return [share for share in shares if share]


def _cut(route: Route, fair: float, replicas: int) -> list[Route]:
    """Pieces of about a fair share at most, as few and as equal as can be."""
    rows = len(route.tokens)
    count = min(replicas, rows, math.ceil(expert_cost(rows) / fair))
    ends = [rows * number // count for number in range(count + 1)]
    return [route.between(start, end) for start, end in pairwise(ends)]
