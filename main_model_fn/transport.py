"""The seam to expert functions: send a call, do something else, read the reply.

Sending and reading are apart so that all calls of a layer leave before local experts compute,
without an event loop in the forward pass (docs/adr/0002-expert-protocol.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from remoe.expert_call import ExpertCall

if TYPE_CHECKING:
    from main_model_fn.express import ExpressLine, RowShape

__all__ = ["ExpertTransport", "PendingReply", "RemoteResult"]


class RemoteResult(msgspec.Struct, frozen=True):
    """`partial` is float32 [rows, hidden] as bytes; `cold_start_s` is what this call waited.

    `replica` names who answered. `busy_s` is the computing time of every replica that was given the call, the `hedges` included.
    """

    partial: bytes
    busy_s: float
    cold_start_s: float
    retries: int
    hedges: int
    bytes_moved: int
    replica: str = ""


class PendingReply(Protocol):
    def result(self) -> RemoteResult:
        """Wait for the reply; raises ExpertUnavailableError once there is no hope of one."""
        ...


class ExpertTransport(Protocol):
    """Used from one thread.

    `beside` says whether functions compute on the caller's own processors while it does something
    else.
    """

    @property
    def beside(self) -> bool: ...

    def send(
        self,
        call: ExpertCall,
        *,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> PendingReply:
        """Send at once and return without waiting; never raises for network trouble.

        `deadline_s` is how long, from now, an answer is of use: a reply is waited for no longer
        than that, nor longer than the transport's own time-out. `traceparent` names the call in
        the trace of whom it is for, if that is traced.
        """
        ...

    def line(self, layer: int, shape: RowShape) -> ExpressLine | None:
        """For calls of one row that leave from within a native step; None if there is no such way."""
        ...

    def replicas(self, layer: int) -> int:
        """How many replicas of the layer's function answer calls now; asking starts none."""
        ...

    def close(self) -> None: ...
