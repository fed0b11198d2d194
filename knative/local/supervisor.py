"""Runs a deployment as local processes: sockets, functions, ticks, control, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from knative.local.control import ControlServer
from knative.local.function import Function
from knative.local.inbox import Inbox
from knative.local.launcher import Launcher, inherited_environment
from knative.local.listening import LOOPBACK, address_of, listen, listen_here
from knative.local.options import RuntimeOptions
from knative.local.run_dir import RunDir
from knative.spec import FunctionSpec
from remoe.runtime_status import Event, RuntimeStatus
from remoe.topology import Topology

__all__ = ["Runnable", "Supervisor"]

_EVENTS_KEPT = 200
# How long a killed supervisor's replicas may still hold the port.
_ORPHANS_S = 12.0


class Runnable(Protocol):
    """What can be run: functions, one of which listens on a given port."""

    @property
    def model(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def gateway(self) -> FunctionSpec: ...
    @property
    def functions(self) -> tuple[FunctionSpec, ...]: ...
    def topology(self, urls: Mapping[str, str]) -> Topology: ...


class Supervisor:
    """`async with Supervisor(...)` starts every function, and on leaving nothing is left.

    `stopping` is set when `remoe down` asks; whoever runs the supervisor then leaves the block.
    """

    def __init__(
        self,
        deployment: Runnable,
        run_dir: RunDir,
        *,
        options: RuntimeOptions | None = None,
        on_event: Callable[[Event], None] = lambda _event: None,
        keep_logs: Path | None = None,
    ) -> None:
        self.stopping = asyncio.Event()
        self.functions: dict[str, Function] = {}
        self._deployment = deployment
        self._run_dir = run_dir
        self._options = options or RuntimeOptions()
        self._listener = on_event
        self._keep_logs = keep_logs
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._started_at = time.monotonic()
        self._cleanup = contextlib.AsyncExitStack()
        self._failure: BaseException | None = None
        self._control = ControlServer(status=self.status, stop=self.stopping.set, scale=self.scale)
        self._change_noted = False

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as cleanup:
            await self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._cleanup.aclose()

    @property
    def url(self) -> str:
        """The gateway's address, as clients on this machine may write it."""
        url = self.functions[self._deployment.gateway.name].url
        for everywhere, here in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
            url = url.replace(everywhere, here)
        return url.replace("http://", f"{self._deployment.scheme}://")

    async def wait_ready(self, name: str) -> bool:
        """Wait until a replica of a function is ready; False once it cannot start."""
        return await self.functions[name].wait_ready()

    async def wait_stopping(self) -> None:
        """Wait for `remoe down`; raises if the supervisor itself failed."""
        await self.stopping.wait()
        if self._failure is not None:
            raise self._failure

    def kill(self) -> None:
        """Do not wait for requests in flight any longer."""
        for function in self.functions.values():
            function.kill()

    def scale(self, name: str, replicas: int, for_s: float) -> bool:
        """Take a wish for a function's replicas (remoe/runtime_status.py); False if unknown."""
        function = self.functions.get(name)
        if function is not None:
            function.ask(replicas, for_s)
        return function is not None

    def status(self) -> RuntimeStatus:
        return RuntimeStatus(
            pid=os.getpid(),
            url=self.url,
            model=self._deployment.model,
            up_s=time.monotonic() - self._started_at,
            functions=[function.status() for function in self.functions.values()],
            events=list(self._events),
        )

    async def _start(self, cleanup: contextlib.AsyncExitStack) -> None:
        # Closed last of all: that is what `remoe down` waits for.
        cleanup.push_async_callback(self._control.close)
        after_a_kill = self._run_dir.acquire()
        cleanup.callback(self._run_dir.release, keep_logs=self._keep_logs)
        lifeline_read, lifeline_write = os.pipe()
        cleanup.callback(os.close, lifeline_write)
        cleanup.callback(os.close, lifeline_read)
        inbox = Inbox(self._take_report)
        cleanup.callback(inbox.close)

        listeners: dict[str, socket.socket] = {}
        with contextlib.ExitStack() as unused:
            for number, spec in enumerate(self._deployment.functions):
                if spec.local_socket:
                    listeners[spec.name] = unused.enter_context(
                        listen_here(self._run_dir.socket(number))
                    )
                    continue
                front = spec is self._deployment.gateway
                port = self._deployment.port if front else 0
                host = self._deployment.host if front else LOOPBACK
                patience_s = _ORPHANS_S if after_a_kill else 0.0
                listeners[spec.name] = unused.enter_context(
                    await listen(port, host=host, patience_s=patience_s)
                )
            urls = {name: address_of(listener) for name, listener in listeners.items()}
            self._deployment.topology(urls).save(self._run_dir.topology)
            env = {
                **inherited_environment(),
                "NOTIFY_SOCKET": inbox.address,
                "REMOE_TOPOLOGY": str(self._run_dir.topology),
                "REMOE_RUNTIME_CONTROL": str(self._run_dir.control),
            }
            for spec in self._deployment.functions:
                self.functions[spec.name] = Function(
                    spec,
                    listener=listeners[spec.name],
                    launcher=Launcher(
                        spec,
                        listener=listeners[spec.name],
                        log_path=self._run_dir.log(spec.name),
                        env=env,
                        lifeline_fd=lifeline_read,
                    ),
                    options=self._options,
                    on_event=self._take_event,
                    on_change=self._note_change,
                )
            unused.pop_all()
        cleanup.push_async_callback(self._stop_functions)
        for function in self.functions.values():
            function.start()
        await self._control.start(self._run_dir.control)
        for period_s, act in (
            (self._options.sample_s, Function.sample),
            (self._options.tick_s, Function.tick),
        ):
            cleanup.push_async_callback(_cancel, self._every(period_s, act))

    def _every(self, period_s: float, act: Callable[[Function], None]) -> asyncio.Task[None]:
        async def run() -> None:
            while True:
                await asyncio.sleep(period_s)
                for function in self.functions.values():
                    act(function)
                self._control.publish()

        task = asyncio.get_running_loop().create_task(run())
        task.add_done_callback(self._ticker_ended)
        return task

    def _ticker_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._failure = task.exception()
            self.stopping.set()

    async def _stop_functions(self) -> None:
        """The gateway first: what it has in flight still needs the others."""
        grace_s = self._options.stop_grace_s
        gateway = self.functions[self._deployment.gateway.name]
        await gateway.stop(grace_s)
        others = [function for function in self.functions.values() if function is not gateway]
        await asyncio.gather(*(function.stop(grace_s) for function in others))

    def _take_report(self, pid: int, fields: Mapping[str, str]) -> None:
        for function in self.functions.values():
            if function.take_report(pid, fields):
                return

    def _note_change(self) -> None:
        """Tell watchers once of all that changes in one turn of the loop."""
        if not self._change_noted:
            self._change_noted = True
            asyncio.get_running_loop().call_soon(self._publish_change)

    def _publish_change(self) -> None:
        self._change_noted = False
        self._control.publish()

    def _take_event(self, event: Event) -> None:
        self._events.append(event)
        self._listener(event)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
