"""`remoe load compare`, `report` and `describe`: what is done before or after a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe.errors import SettingsError

__all__ = ["compare", "describe", "parse_window", "report"]


def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder.", exists=True, file_okay=False)],
    second: Annotated[Path, typer.Argument(help="Another's.", exists=True, file_okay=False)],
    *,
    level: Annotated[float, typer.Option(help="Of confidence.", min=0.5, max=0.999)] = 0.95,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.", min=100)] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="Write a page.", show_default="only the terminal")
    ] = None,
) -> None:
    """Compare two runs, with bootstrap confidence intervals of each ratio."""
    from rich.console import Console

    from loadgen.compare import compare as compare_runs
    from loadgen.plots import ParetoPoint, pareto
    from loadgen.progress import print_table
    from loadgen.report import comparison_page
    from loadgen.results import RunFolder

    runs = [RunFolder(folder).load() for folder in (first, second)]
    comparison = compare_runs(*runs, level=level, resamples=resamples)
    console = Console(highlight=False)
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    print_table(console, comparison.table())
    if out is not None:
        points = [
            ParetoPoint(run.name, (run.summary.latency.e2e_ms.p50 or 0.0) / 1e3, each)
            for run in runs
            if run.summary.cost and (each := run.summary.cost.per_request_usd.mean) is not None
        ]
        out.write_text(comparison_page(comparison, [pareto(points)]), encoding="utf-8")
        console.print(f"Page: {out}")


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.", exists=True, file_okay=False)],
) -> None:
    """Compute a run's figures and page again from its requests, also of a run that was killed."""
    from rich.console import Console

    from loadgen.results import RunFolder
    from remoe.cli.load_run import show_result

    folder = RunFolder(run)
    result = folder.load()
    folder.finish(result)
    show_result(Console(highlight=False), result, folder)


def describe(
    trace: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, show_default="the one that ships"),
    ] = None,
    *,
    seed: Annotated[int, typer.Option(help="Of traces that are rates.", min=0)] = 0,
    window: Annotated[str | None, typer.Option(help="Seconds, as 600:1200.")] = None,
) -> None:
    """Say what is in a trace: how many requests, how fast, how bursty, how long."""
    from rich.console import Console

    from loadgen.default_trace import DEFAULT_TRACE
    from loadgen.describe import describe_trace
    from loadgen.progress import print_table

    start_s, end_s = parse_window(window)
    table = describe_trace(trace or DEFAULT_TRACE, seed=seed, start_s=start_s, end_s=end_s)
    print_table(Console(highlight=False), table)


def parse_window(text: str | None) -> tuple[float, float | None]:
    """`600:1200` as (600, 1200); raises SettingsError."""
    if text is None:
        return 0.0, None
    start, colon, end = text.partition(":")
    try:
        start_s, end_s = float(start or 0), float(end) if end else None
        if colon and start_s >= 0 and (end_s is None or end_s > start_s):
            return start_s, end_s
    except ValueError:
        pass
    raise SettingsError(f"--window {text!r} is not like 600:1200, 600: or :1200 (seconds)")
