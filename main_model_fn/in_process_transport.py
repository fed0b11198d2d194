"""Expert calls without expert functions: computed in this process, from the mapped checkpoint.

For running on one machine without functions (`REMOE_MAIN_TRANSPORT=in-process`), and the
arithmetic that tests compare the network's answers with.
"""

from __future__ import annotations

import time

from main_model_fn.transport import PendingReply, RemoteResult
from remoe.expert_call import ExpertCall
from remoe.kernel.interface import ExpertKernel

__all__ = ["InProcessTransport"]


class InProcessTransport:
    """One kernel for all layers. A call is computed when its reply is asked for."""

    beside = False

    def __init__(self, kernel: ExpertKernel) -> None:
        self._kernel = kernel

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        return _Computation(self._kernel, call)

    def line(self, layer: int, shape: object) -> None:
        return None

    def replicas(self, layer: int) -> int:
        return 1

    def close(self) -> None:
        """Nothing is open; the kernel is its owner's."""


class _Computation:
    def __init__(self, kernel: ExpertKernel, call: ExpertCall) -> None:
        self._kernel = kernel
        self._call = call

    def result(self) -> RemoteResult:
        began = time.perf_counter()
        partial = self._kernel.answer(self._call)
        return RemoteResult(
            partial=partial,
            busy_s=time.perf_counter() - began,
            cold_start_s=0.0,
            retries=0,
            hedges=0,
            bytes_moved=0,
        )
