"""Which replicas are alive, how long they hold memory, and which ones had to start cold.

See papers.md B.5, B.6.
"""

from __future__ import annotations

import numpy as np

from remoe.moeless.placement import Placement

__all__ = ["KEEP_ALIVE_S", "LayerResidency"]

KEEP_ALIVE_S = 60.0  # the paper says fixed and not how long; a common platform's minute


class LayerResidency:
    """One layer's replicas on all GPUs. A replica dies when unused for `keep_alive_s`.

    It dies earlier when its GPU needs the room: `room` replicas at most, the least recently used
    idle one first.
    """

    def __init__(self, gpus: int, *, keep_alive_s: float, room: int | None = None) -> None:
        self._gpus = gpus
        self._keep_alive_s = keep_alive_s
        self._room = room
        # Each alive replica's last use, by expert and GPU, the latest first.
        self._alive: dict[tuple[int, int], list[float]] = {}
        self._replica_s = 0.0

    def warm(self, now_s: float) -> Placement:
        """The replicas that are alive; those whose time is over die."""
        pairs: list[tuple[int, int]] = []
        for key, uses in list(self._alive.items()):
            while uses and now_s - uses[-1] > self._keep_alive_s:
                uses.pop()
                self._replica_s += self._keep_alive_s
            if not uses:
                del self._alive[key]
            pairs += [key] * len(uses)
        expert = np.array([expert for expert, _ in pairs], np.intp)
        gpu = np.array([gpu for _, gpu in pairs], np.intp)
        return Placement(expert, gpu, self._gpus)

    def use(self, placement: Placement, now_s: float) -> list[int]:
        """Use the placement's replicas now; returns the GPU of each that has to start cold."""
        wanted: dict[tuple[int, int], int] = {}
        for key in zip(placement.expert.tolist(), placement.gpu.tolist(), strict=True):
            wanted[key] = wanted.get(key, 0) + 1
        cold: list[int] = []
        for key, count in wanted.items():
            uses = self._alive.setdefault(key, [])
            reused = min(count, len(uses))
            self._replica_s += sum(now_s - used_s for used_s in uses[:reused])
            cold += [key[1]] * (count - reused)
            self._alive[key] = [now_s] * count + uses[reused:]
        if self._room is not None and cold:
            self._evict(now_s)
        return cold

    def _evict(self, now_s: float) -> None:
        on_gpu = [0] * self._gpus
        for (_, gpu), uses in self._alive.items():
            on_gpu[gpu] += len(uses)
        for gpu, count in enumerate(on_gpu):
            for _ in range(count - (self._room or 0)):
                idle = [
                    (uses[-1], key)
                    for key, uses in self._alive.items()
                    if key[1] == gpu and uses and uses[-1] < now_s
                ]
                if not idle:
                    break
                used_s, key = min(idle)
                self._alive[key].pop()
                self._replica_s += now_s - used_s

    def until(self, now_s: float) -> float:
        """All replica-seconds until now, idle time within the keep-alive included."""
        self.warm(now_s)  # counts and forgets those whose time was over
        idle_s = sum(now_s - used_s for uses in self._alive.values() for used_s in uses)
        return self._replica_s + idle_s
