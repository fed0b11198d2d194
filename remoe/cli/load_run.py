"""Running a load in a terminal: live line, tables, page, and an exit status for scripts."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import uvloop
from rich.console import Console
from rich.text import Text

from loadgen.config import LoadConfig
from loadgen.progress import LiveLine, print_table
from loadgen.replay import Progress
from loadgen.report import render, write_report
from loadgen.results import RunFolder, RunResult, TargetFacts
from loadgen.run import Load, run_load
from loadgen.sweep import knee_of, parse_rates, run_sweep, sweep_plot, sweep_table
from loadgen.tables import tables_of, warnings_of
from remoe.cli.load_probe import local_probe

__all__ = ["run_in_terminal", "show_result"]

_OK, _STOPPED, _MISSED = 0, 1, 3


def run_in_terminal(
    config: LoadConfig, out: Path, *, api_key: str | None, sweep: str | None
) -> int:
    """Return the exit status: 3 for a missed SLO, 1 for a run that was stopped, else 0.

    uvloop, since its timers and sockets leave a median schedule lag of half a millisecond.
    """
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a socket a request
    console = Console(highlight=False)
    terminal = _Terminal(config, out, api_key, console)
    work = (
        terminal.sweep(sweep, config.duration_s)
        if sweep is not None and config.duration_s is not None
        else terminal.once()
    )
    status: int = uvloop.run(work)
    return status


def show_result(console: Console, result: RunResult, folder: RunFolder) -> None:
    """Print every table, draw the page, and say where things are."""
    console.print()
    for table in tables_of(result.summary):
        print_table(console, table)
    for warning in warnings_of(result):
        console.print(Text(warning, "yellow"))
    console.print(f"Report: {write_report(result, folder)}")


class _Terminal:
    def __init__(
        self, config: LoadConfig, out: Path, api_key: str | None, console: Console
    ) -> None:
        self._config = config
        self._out = out
        self._api_key = api_key
        self._console = console
        self._probe = local_probe(config.url)

    async def once(self) -> int:
        folder = RunFolder(self._out)
        result = await self._run(self._config, folder)
        show_result(self._console, result, folder)
        if result.target.stopped:
            return _STOPPED
        if not result.summary.passed:
            self._console.print(Text("SLO missed", "bold red"))
            return _MISSED
        return _OK

    async def sweep(self, rates: str, duration_s: float) -> int:
        points = await run_sweep(
            self._config,
            parse_rates(rates),
            lambda staged, name: self._run(staged, RunFolder(self._out / name)),
            duration_s=duration_s,
        )
        for point in points:
            write_report(point.result, RunFolder(self._out / point.result.name))
        table, knee = sweep_table(points), knee_of(points)
        self._console.print()
        print_table(self._console, table)
        page = self._out / "report.html"
        page.write_text(
            render(
                title=f"{points[0].result.target.model}: sweep",
                subtitle=f"{duration_s:g} s at each rate",
                verdict=None,
                passed=True,
                header=[],
                notes=points[0].result.target.notes,
                tables=[table],
                plots=[sweep_plot(points)],
            ),
            encoding="utf-8",
        )
        words = f"{knee.rate_rps:g} requests/s" if knee else "below the lowest rate"
        if points[-1].saturated:
            self._console.print(f"At {points[-1].rate_rps:g} requests/s: {points[-1].saturated}")
        self._console.print(f"Knee: {words}\nReport: {page}")
        return _STOPPED if points[-1].result.target.stopped else _OK

    async def _run(self, config: LoadConfig, folder: RunFolder) -> RunResult:
        live = LiveLine(self._console)
        loop = asyncio.get_running_loop()

        def start(target: TargetFacts, progress: Progress, stop: Callable[[str], None]) -> None:
            live.begin(target, progress)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop, "by you")

        try:
            return await run_load(
                config,
                folder,
                Load(
                    api_key=self._api_key,
                    probe=self._probe,
                    say=lambda words: self._console.print(Text(words, "dim")),
                    on_start=start,
                ),
            )
        finally:
            await live.end()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
