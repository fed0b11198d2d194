"""The resident ledger: every second of memory held is shared by the requests that were there.

At each moment the memory of all live replicas is divided equally among the requests in the system,
from a request's arrival to its last byte. Seconds without any request are keep-alive: nobody's,
and counted apart. A virtual clock, as in fair queueing, makes a request's share one subtraction:
it advances by memory over requests, and nothing is ever counted twice or left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from remoe.runtime_status import RuntimeStatus
from remoe.topology import Topology

__all__ = ["ResidentMeter", "ResidentShare", "Stay"]


@dataclass(frozen=True, slots=True)
class ResidentShare:
    """GB·s of memory held, by whose it was; `starting_gb_s` is a part of the others.

    Also used for rates, in GB.
    """

    main_gb_s: float = 0.0
    experts_gb_s: float = 0.0
    services_gb_s: float = 0.0
    starting_gb_s: float = 0.0

    @property
    def total_gb_s(self) -> float:
        return self.main_gb_s + self.experts_gb_s + self.services_gb_s

    def plus(self, other: ResidentShare, factor: float = 1.0) -> ResidentShare:
        return ResidentShare(
            self.main_gb_s + factor * other.main_gb_s,
            self.experts_gb_s + factor * other.experts_gb_s,
            self.services_gb_s + factor * other.services_gb_s,
            self.starting_gb_s + factor * other.starting_gb_s,
        )


class Stay:
    """One request in the system."""

    def __init__(self, meter: ResidentMeter, began: ResidentShare) -> None:
        self._meter = meter
        self._began = began
        self._final: ResidentShare | None = None

    def share(self) -> ResidentShare | None:
        """The share up to now, or up to `leave`; None if replicas are not known."""
        if not self._meter.known:
            return None
        return self._final or self._meter.virtual_now().plus(self._began, -1)

    def leave(self) -> None:
        if self._final is None:
            self._final = self._meter.virtual_now().plus(self._began, -1)
            self._meter.requests -= 1


class ResidentMeter:
    """Integrates the memory that the runtime says is held; `known` once it has said anything."""

    def __init__(self, topology: Topology, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = 0
        self.known = False
        self._main_url = topology.main_url
        self._expert_urls = {expert.url for expert in topology.experts}
        self._clock = clock
        self._advanced_at = clock()
        self._rate = ResidentShare()
        self._virtual = ResidentShare()
        self._idle = ResidentShare()

    def enter(self) -> Stay:
        stay = Stay(self, self.virtual_now())
        self.requests += 1
        return stay

    def update(self, status: RuntimeStatus) -> None:
        """Take the replicas that are alive from now on."""
        self._advance()
        self.known = True
        main = experts = services = starting = 0.0
        for function in status.functions:
            limit_gb = function.memory_limit_bytes / 1e9
            held_gb = limit_gb * len(function.replicas)
            starting += limit_gb * sum(replica.state == "starting" for replica in function.replicas)
            if function.url == self._main_url:
                main += held_gb
            elif function.url in self._expert_urls:
                experts += held_gb
            else:
                services += held_gb
        self._rate = ResidentShare(main, experts, services, starting)

    def forget(self) -> None:
        """The runtime is out of sight: hold still rather than guess."""
        self._advance()
        self._rate = ResidentShare()

    def take_keep_alive(self) -> ResidentShare:
        """What was held without any request since the last call."""
        self._advance()
        idle, self._idle = self._idle, ResidentShare()
        return idle

    def virtual_now(self) -> ResidentShare:
        self._advance()
        return self._virtual

    def _advance(self) -> None:
        now = self._clock()
        elapsed_s, self._advanced_at = now - self._advanced_at, now
        if self.requests:
            self._virtual = self._virtual.plus(self._rate, elapsed_s / self.requests)
        else:
            self._idle = self._idle.plus(self._rate, elapsed_s)
