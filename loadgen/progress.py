"""The live line of a run, and its tables in the terminal."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from loadgen.replay import Progress
from loadgen.results import TargetFacts
from loadgen.tables import Table

__all__ = ["LiveLine", "print_table"]

_REFRESH_S = 0.25
_LAGS_SHOWN = 1000


class LiveLine:
    """Sent, in flight, done, errors and lag, four times a second; nothing without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: asyncio.Task[None] | None = None

    def begin(self, target: TargetFacts, progress: Progress) -> None:
        count = "" if progress.planned is None else f"{progress.planned} "
        span = f" over {target.span_s:.0f} s" if target.span_s else ""
        self._console.print(f"Sending {count}requests{span} to {target.model} at {target.url}")
        for note in target.notes:
            self._console.print(Text(f"note: {note}", "yellow"))
        if self._console.is_terminal:
            self._task = asyncio.get_running_loop().create_task(self._show(progress))

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _show(self, progress: Progress) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(progress_line(progress), refresh=True)
                await asyncio.sleep(_REFRESH_S)


def progress_line(progress: Progress) -> Text:
    lags = progress.lags_s[-_LAGS_SHOWN:]
    lag = f"{np.percentile(lags, 99) * 1e3:.1f} ms" if lags else "-"
    line = Text.assemble(
        (f"sent {progress.sent}", "bold"),
        "" if progress.planned is None else f"/{progress.planned}",
        f"  in flight {progress.in_flight}  done {progress.done - progress.errors}  ",
        (f"errors {progress.errors}", "red" if progress.errors else "dim"),
        (f"  skipped {progress.skipped}" if progress.skipped else "", "yellow"),
        f"  lag p99 {lag}",
    )
    if progress.stopped:
        line.append(f"  stopping: {progress.stopped}", "bold red")
    return line


def print_table(console: Console, table: Table) -> None:
    """The same table as in the report."""
    shown = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=any(table.columns),
    )
    for position, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if position == 0 else "right")
    for row in table.rows:
        style = "bold red" if "MISSED" in row else ""
        shown.add_row(*(Text(cell, style) for cell in row))
    console.print(shown)
    console.print()
