"""What the main function knows of one expert function: its address, its state, how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from main_model_fn.breaker import CircuitBreaker
from main_model_fn.express import ExpressLine
from main_model_fn.hedging import HedgeDelay
from main_model_fn.http_connection import HttpAddress
from main_model_fn.replica_connections import ReplicaConnections
from remoe.expert_call import CONTENT_TYPE, PATH, bearer
from remoe.kernel.idle_polling import IdlePolling
from remoe.topology import ExpertEndpoint

__all__ = ["Channel", "on_this_machine"]

# Below Knative's shortest window: who answered so lately has not scaled to zero since.
_WARM_FOR_S = 5.0
_THIS_MACHINE = {"127.0.0.1", "::1", "localhost"}


class Channel:
    """Its connections, its breaker, how long its calls take; `polling` if it is on this machine."""

    def __init__(
        self,
        endpoint: ExpertEndpoint,
        *,
        timeout_s: float,
        hedge_floor_s: float,
        body_limit_bytes: int,
        token: str,
        clock: Callable[[], float],
        polling: IdlePolling | None,
    ) -> None:
        self.name = endpoint.name
        self.address = HttpAddress.of(endpoint.url)
        credentials = {"authorization": bearer(token)} if token else {}
        self.head = self.address.request("POST", PATH, content_type=CONTENT_TYPE, **credentials)
        self.timeout_s = timeout_s
        self.connections = ReplicaConnections(self.address, body_limit_bytes, clock)
        self.breaker = CircuitBreaker(clock)
        self.hedge_delay = HedgeDelay(hedge_floor_s)
        self.polling = polling
        self.line: ExpressLine | None = None
        self._clock = clock
        self._answered_at = -math.inf

    def expect_reply(self, now: float) -> None:
        """Say that a call leaves; `now` is `time.monotonic()`."""
        if self.polling is not None:
            self.polling.stay_awake(now)

    def answered(self) -> None:
        self._answered_at = self._clock()
        self.breaker.succeeded()

    @property
    def warm(self) -> bool:
        """Whether a replica must be there, because one answered a moment ago."""
        return self._clock() - self._answered_at < _WARM_FOR_S


def on_this_machine(functions: Iterable[ExpertEndpoint]) -> bool:
    """Whether all of them are, and there are any."""
    addresses = [HttpAddress.of(function.url) for function in functions]
    return bool(addresses) and all(one.path or one.host in _THIS_MACHINE for one in addresses)
