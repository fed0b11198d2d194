"""One function: its socket, its activator, its replicas, and when to start or end one.

The supervisor watches the listening socket only while no replica starts or runs. A connection that
arrives then wakes the function, and waits in the kernel's backlog; replicas accept by themselves.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from knative.autoscaler import Autoscaler
from knative.local.backoff import Backoff
from knative.local.counters import Counters
from knative.local.describe import describe_function
from knative.local.launcher import Launcher
from knative.local.listening import address_of
from knative.local.options import RuntimeOptions
from knative.local.process import describe_exit
from knative.local.refusal import Refusal
from knative.local.replica import Replica, StartReason
from knative.spec import FunctionSpec
from remoe.runtime_status import Event, EventKind, FunctionStatus

__all__ = ["Function"]

_MIB = 1 << 20
# A timer may come a moment before the clock says so.
_TIMER_SLACK_S = 0.01


class Function:
    """Keeps as many replicas as the autoscaler wants. Owns `listener` until `close`."""

    def __init__(
        self,
        spec: FunctionSpec,
        *,
        listener: socket.socket,
        launcher: Launcher,
        options: RuntimeOptions,
        on_event: Callable[[Event], None],
        on_change: Callable[[], None],
    ) -> None:
        policy = spec.policy()
        if options.window_s is not None:
            policy = replace(policy, window_s=options.window_s)
        self.spec = spec
        self.url = address_of(listener)
        self.counters = Counters()
        self.desired = 0
        self.replicas: list[Replica] = []
        self._listener = listener
        self._launcher = launcher
        self._options = options
        self._on_event = on_event
        self._on_change = on_change
        self._progress_deadline_s = options.progress_deadline_s or policy.progress_deadline_s
        self._autoscaler = Autoscaler(
            policy,
            container_concurrency=spec.container_concurrency,
            clock=time.monotonic,
            grace_s=options.scale_to_zero_grace_s,
        )
        self._backoff = Backoff(options, time.monotonic)
        self._refusal = Refusal(listener)
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._closing = False
        self._started_count = 0
        self._owed_restarts = 0
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Start the initial replicas; from now on a connection wakes the function."""
        self.desired = self._autoscaler.decide(ready=0, starting=0).desired
        self._reconcile("initial")

    def sample(self) -> None:
        """Feed the autoscaler, and end a replica that holds more memory than its limit."""
        ready = [replica for replica in self.replicas if replica.state == "ready"]
        self._autoscaler.record(sum(replica.take_mean_concurrency() for replica in ready))
        limit = self.spec.memory_mib * _MIB
        for replica in self.replicas:
            replica.measure_memory()
            if replica.memory_bytes > limit and not replica.memory_killed:
                replica.memory_killed = True
                self.counters.memory_kills += 1
                self._say(
                    "memory_kill",
                    replica,
                    f"{replica.name} held {replica.memory_bytes / _MIB:.0f} MiB, its limit is "
                    f"{self.spec.memory_mib} MiB: killed",
                )
                replica.process.kill()

    def tick(self) -> None:
        """Let the autoscaler decide, and act on it."""
        before = self.desired
        decision = self._autoscaler.decide(
            ready=self._count("ready"), starting=self._count("starting")
        )
        self.desired = decision.desired
        name = self.spec.name
        if self.desired == 0 < before and self._live():
            self._say("scaled_to_zero", None, f"{name} scaled to zero, idle")
        elif self.desired > before:
            why = "panic" if decision.panicking else f"{decision.stable:.1f} in flight"
            self._say("scaled_out", None, f"{name} scales to {self.desired} replicas ({why})")
        elif 0 < self.desired < before:
            self._say("scaled_in", None, f"{name} scales down to {self.desired}")
        self._reconcile("scale_out")

    def ask(self, replicas: int, for_s: float) -> None:
        """Keep at least so many replicas for a while; with 0, none unless somebody is calling."""
        self._autoscaler.ask(replicas, for_s)
        idle = not any(replica.in_flight for replica in self.replicas)
        if replicas or idle:
            self.tick()

    def take_report(self, pid: int, fields: Mapping[str, str]) -> bool:
        """Take a datagram if one of our replicas sent it."""
        for replica in self.replicas:
            if replica.process.pid == pid:
                was = replica.state
                self.counters.requests += (new := replica.take_report(fields))
                if new or replica.in_flight:
                    self.counters.last_call_at = time.monotonic()
                if replica.state != was:
                    self._state_changed(replica)
                return True
        return False

    async def wait_ready(self) -> bool:
        """Wait until a replica is ready; False once the function cannot start."""
        while not self._count("ready"):
            if self._backoff.refusing:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def stop(self, grace_s: float) -> None:
        """Close the socket, drain all replicas, and kill those that outlast the grace."""
        self._close_socket()
        for replica in list(self.replicas):
            self._end(replica, grace_s)
        while self.replicas:
            self._changed.clear()
            await self._changed.wait()
        await self._refusal.close()
        self._launcher.log.close()

    def kill(self) -> None:
        """End every replica now; `stop` then returns soon."""
        for replica in self.replicas:
            replica.told_to_go = True
            replica.process.kill()

    def status(self) -> FunctionStatus:
        return describe_function(
            self.spec,
            url=self.url,
            desired=self.desired,
            replicas=self.replicas,
            counters=self.counters,
            backoff=self._backoff,
        )

    def _live(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state != "draining"]

    def _count(self, state: str) -> int:
        return sum(replica.state == state for replica in self.replicas)

    def _reconcile(self, reason: StartReason) -> None:
        """Start or end replicas until there are as many as desired, and watch the socket or not."""
        if self._closing:
            return
        live = self._live()
        if self.desired == 0:
            self._owed_restarts = 0
        if not self._backoff.waiting:
            for _ in range(self.desired - len(live)):
                self._spawn(reason)
        surplus = len(live) - self.desired
        # Those that do not serve go first, then the least busy, then the youngest.
        order = sorted(live, key=lambda r: (r.state == "ready", r.in_flight, -r.started_at))
        for replica in order[: max(0, surplus)]:
            self._end(replica, self.spec.timeout_s)
        watch = not self._live() and (not self._backoff.waiting or self._backoff.refusing)
        self._watch(watch)

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_reader(self._listener, self._connection_waits)
        elif self._watching and not wanted:
            self._loop.remove_reader(self._listener)
        self._watching = wanted

    def _connection_waits(self) -> None:
        """The activator: somebody connected and no replica is there to accept."""
        self.desired = max(self.desired, self._autoscaler.activate())
        self.counters.last_call_at = time.monotonic()
        if self._backoff.waiting:
            self._refuse_waiting()
        else:
            self._reconcile("activation")

    def _refuse_waiting(self) -> None:
        self.counters.refused += self._refusal.refuse_waiting(
            f"{self.spec.name} cannot start: {self._backoff.reason}. It is tried again in "
            f"{self._backoff.remaining_s:.0f} s; `remoe logs {self.spec.name}` says more.",
            retry_after_s=self._backoff.remaining_s,
        )

    def _spawn(self, reason: StartReason) -> None:
        self._started_count += 1
        if self._owed_restarts:
            self._owed_restarts -= 1
            reason = "restart"
        name = f"{self.spec.name}-r{self._started_count}"
        process, pipe = self._launcher.launch(
            name, on_exit=lambda code: self._exited(replica, code)
        )
        replica = Replica(name, reason, process, pipe)
        self.replicas.append(replica)
        self._on_change()
        if reason == "restart":
            self.counters.restarts += 1
            self._say("restart", replica, f"{name} starts in place of the one that failed")
        self._loop.call_later(self._progress_deadline_s, self._start_too_slow, replica)

    def _start_too_slow(self, replica: Replica) -> None:
        if replica.state == "starting" and replica.process.running:
            replica.failed_to_start = True
            replica.process.kill()

    def _end(self, replica: Replica, grace_s: float) -> None:
        if not replica.told_to_go:
            replica.told_to_go = True
            replica.state = "draining"
            replica.process.terminate()
            self._on_change()
        self._loop.call_later(grace_s, replica.process.kill)

    def _state_changed(self, replica: Replica) -> None:
        if replica.state == "ready":
            duration_ms = (time.monotonic() - replica.started_at) * 1e3
            self._backoff.worked()
            kind: EventKind = "ready"
            text = f"{replica.name} ready after {duration_ms:.0f} ms"
            if replica.reason == "activation":
                kind = "cold_start"
                self.counters.add_cold_start(duration_ms)
                text = f"cold start of {self.spec.name} took {duration_ms:.0f} ms"
            self._say(kind, replica, text)
        self._changed.set()
        self._on_change()
        self._reconcile("scale_out")

    def _exited(self, replica: Replica, code: int) -> None:
        replica.pipe.finish()
        self.replicas.remove(replica)
        self._on_change()
        if not (replica.told_to_go or (replica.state == "draining" and code == 0)):
            self._failed(replica, code)
        self._changed.set()
        self._reconcile("activation")

    def _failed(self, replica: Replica, code: int) -> None:
        """Count the failure, and try again now or later."""
        what = describe_exit(code)
        if replica.memory_killed:
            what = f"held more than {self.spec.memory_mib} MiB"
        elif replica.failed_to_start:
            what = f"was not ready within {self._progress_deadline_s:g} s"
        self.counters.crashes += 1
        self._owed_restarts += 1
        # Who is killed outright cannot say why; its last line is about something else.
        said_why = replica.pipe.last_line and code != -signal.SIGKILL
        last = f": {replica.pipe.last_line[:200]}" if said_why else ""
        self._say("crash", replica, f"{replica.name} {what}{last}")
        self._backoff.failed(f"{what}{last}", ready_at=replica.ready_at)
        if replica.failed_to_start:
            self._backoff.give_up()
        if self._backoff.refusing and not self._live():
            self._say(
                "refusing",
                replica,
                f"{self.spec.name} failed {self._backoff.failures} times in a row; callers get 503",
            )
            self._refuse_waiting()
        retry_in_s = self._backoff.remaining_s + _TIMER_SLACK_S
        self._loop.call_later(retry_in_s, self._reconcile, "restart")

    def _close_socket(self) -> None:
        if not self._closing:
            self._closing = True
            if self._watching:
                self._loop.remove_reader(self._listener)
                self._watching = False
            self._listener.close()

    def _say(self, kind: EventKind, replica: Replica | None, text: str) -> None:
        name = replica.name if replica else None
        event = Event(at=time.time(), kind=kind, function=self.spec.name, replica=name, text=text)
        self._launcher.log.write("runtime", f"{kind}: {text}".encode())
        self._on_event(event)
