"""Which replica of a layer's experts lies on which GPU, and what load that puts there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Placement"]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One layer's replicas, sorted by expert: replica i is one of `expert[i]` and lies on `gpu[i]`.

    Serves any workers, not only GPUs. `gpus` is how many there are, empty ones included.
    """

    expert: NDArray[np.intp]  # [replicas]
    gpu: NDArray[np.intp]  # [replicas]
    gpus: int

    @classmethod
    def of(cls, expert: NDArray[np.intp], gpu: NDArray[np.intp], gpus: int) -> Placement:
        """The placement of replicas in any order."""
        order = np.lexsort((gpu, expert))
        return cls(expert[order], gpu[order], gpus)

    def replicas(self, experts: int) -> NDArray[np.intp]:
        """How many replicas each expert has: [experts]."""
        return np.bincount(self.expert, minlength=experts)

    def replica_loads(self, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each replica's even share of its expert's load (B.2): [experts] to [replicas].

        Raises ValueError if an expert has load and no replica: its tokens would be lost.
        """
        counts = self.replicas(len(loads))
        if np.any(loads[counts == 0] > 0):
            lost = np.flatnonzero((counts == 0) & (loads > 0)).tolist()
            raise ValueError(f"experts {lost} have load and no replica; place one of each first")
        share: NDArray[np.float64] = loads[self.expert] / counts[self.expert]
        return share

    def gpu_loads(self, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of its replicas' loads on each GPU: [experts] to [gpus]."""
        summed: NDArray[np.float64] = np.zeros(self.gpus)
        np.add.at(summed, self.gpu, self.replica_loads(loads))
        return summed
