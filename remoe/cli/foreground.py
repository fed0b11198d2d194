"""The terminal side of a running supervisor: start-up progress, instructions, events, the end."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from knative.deployment import Deployment
from knative.local.run_dir import RunDir
from knative.local.supervisor import Supervisor
from knative.spec import FunctionSpec
from remoe.runtime_status import Event

__all__ = ["run_foreground"]

_POLL_S = 0.2
_LOG_LINES = 15
_STYLES = {
    "ready": "green",
    "cold_start": "yellow",
    "crash": "red",
    "memory_kill": "red",
    "refusing": "bold red",
    "restart": "yellow",
}


def run_foreground(deployment: Deployment, run_dir: RunDir, *, keep_logs: Path | None) -> int:
    """Run until Ctrl-C, SIGTERM or `remoe down`; returns the exit status."""
    return asyncio.run(_Foreground(deployment, run_dir, keep_logs).run())


class _Foreground:
    def __init__(self, deployment: Deployment, run_dir: RunDir, keep_logs: Path | None) -> None:
        self._deployment = deployment
        self._run_dir = run_dir
        self._keep_logs = keep_logs
        self._console = Console(highlight=False, soft_wrap=True)
        self._supervisor = Supervisor(deployment, run_dir, on_event=self._tell, keep_logs=keep_logs)
        self._telling = False
        self._asked_to_stop = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        async with self._supervisor:
            code = await self._until_stopped()
            self._telling = False
            if code == 0:
                self._console.print("\nStopping (Ctrl-C again to not wait for requests) ...")
        self._console.print(f"Stopped. {len(self._deployment.functions)} functions, none left.")
        if self._keep_logs is not None:
            self._console.print(f"Logs are in {self._keep_logs}.")
        return code

    def _stop(self) -> None:
        if self._asked_to_stop:
            self._supervisor.kill()
        self._asked_to_stop = True
        self._supervisor.stopping.set()

    async def _until_stopped(self) -> int:
        stopping = asyncio.create_task(self._supervisor.wait_stopping())
        starting = asyncio.create_task(self._wait_until_usable())
        try:
            await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await stopping
                return 0
            failed = await starting
            if failed is not None:
                self._explain(failed)
                return 1
            self._introduce()
            self._telling = True
            await stopping
            return 0
        finally:
            stopping.cancel()
            starting.cancel()

    async def _wait_until_usable(self) -> FunctionSpec | None:
        """Show progress until gateway, planner and main function are ready, or one has failed."""
        needed = (self._deployment.gateway, self._deployment.planner, self._deployment.main)
        names = ", ".join(f"{spec.name}" for spec in needed)
        self._console.print(
            f"Starting {names}; {len(self._deployment.experts)} expert functions stay at zero."
        )
        waits = {
            asyncio.create_task(self._supervisor.wait_ready(spec.name)): spec for spec in needed
        }
        pending = set(waits)
        began = time.monotonic()
        try:
            with self._console.status("") as line:
                while pending:
                    done, pending = await asyncio.wait(
                        pending, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    elapsed_s = time.monotonic() - began
                    for task in done:
                        spec = waits[task]
                        if not task.result():
                            return spec
                        self._console.print(f"  [green]✓[/] {spec.name} ({elapsed_s:.1f} s)")
                    left = ", ".join(self._progress(waits[task].name) for task in pending)
                    line.update(f"{left} ({elapsed_s:.0f} s)")
        finally:
            for task in pending:
                task.cancel()
        return None

    def _progress(self, name: str) -> str:
        status = self._supervisor.functions[name].status()
        return f"{name}: {status.detail}" if status.detail else name

    def _introduce(self) -> None:
        url = self._supervisor.url
        model = self._deployment.model
        self._console.print(
            Text.assemble(("\nRemoe is running on ", "bold"), (url, "bold cyan"), "\n")
        )
        self._console.print(
            "Ask it something:\n"
            f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
            f'    -d \'{{"model": "{model}", "stream": true, "messages": '
            '[{"role": "user", "content": "What is the capital of France?"}]}\'\n\n'
            "Or from Python, with the openai package:\n"
            f'  client = openai.OpenAI(base_url="{url}/v1", api_key="none")\n'
            f'  client.chat.completions.create(model="{model}",\n'
            '      messages=[{"role": "user", "content": "Hello!"}])\n\n'
            "In another terminal:\n"
            "  remoe status    which experts are awake, and what waking them took\n"
            "  remoe logs -f   what every function writes\n"
            "  remoe down      stop (or Ctrl-C here)\n",
            markup=False,
        )

    def _explain(self, spec: FunctionSpec) -> None:
        status = self._supervisor.functions[spec.name].status()
        self._console.print(
            Text.assemble(
                ("error: ", "bold red"),
                f"{spec.name} does not start; it failed {status.crashes} times. It said last:",
            )
        )
        lines = self._run_dir.log(spec.name).read_text(errors="replace").splitlines()
        said = [line.partition(" | ") for line in lines if not line.startswith("runtime | ")]
        last = [text for name, _, text in said if name == said[-1][0]]
        self._console.print("\n".join(last[-_LOG_LINES:]), markup=False, style="dim")

    def _tell(self, event: Event) -> None:
        if not self._telling and event.kind not in {"crash", "memory_kill", "refusing"}:
            return
        at = time.strftime("%H:%M:%S", time.localtime(event.at))
        try:
            self._console.print(
                Text.assemble((f"{at}  ", "dim"), (event.text, _STYLES.get(event.kind, "")))
            )
        except (OSError, SystemExit):  # the terminal is gone, or what we were piped into
            self._supervisor.stopping.set()
