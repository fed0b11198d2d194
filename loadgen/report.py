"""`report.html`: figures and pictures of one run in one file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jinja2

from loadgen.compare import Comparison
from loadgen.plots import Plot, all_plots, svg_data_uri
from loadgen.results import RunFolder, RunResult
from loadgen.statistics import METHOD
from loadgen.tables import Table, header_lines, tables_of, warnings_of

__all__ = ["comparison_page", "render", "run_page", "write_report"]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "data"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_DEFINITIONS = (
    ("TTFT", "first chunk with text, from the moment the request was sent"),
    ("TPOT", "(E2E - TTFT) / (output tokens - 1), of each request with two tokens or more"),
    ("ITL", "each gap between chunks with text, all requests together"),
    ("E2E", "last byte, from the moment the request was sent"),
    ("E2E from schedule", "last byte, from the moment it should have been sent"),
    ("schedule lag", "when it was sent, from when it should have been"),
    ("goodput", "requests that completed within every bound of the SLO"),
    ("hit rate", "share of routes that went to experts in the main function"),
    ("idle share", "memory times time in replicas without a request, of all that was held"),
    ("busy ledger", "memory held times time busy, as the papers count"),
    ("resident ledger", "memory times time of all replicas, cold starts and keep-alive included"),
    ("percentiles", METHOD),
)


def write_report(result: RunResult, folder: RunFolder) -> Path:
    """Draw everything and write the page; returns its path."""
    folder.report.write_text(run_page(result), encoding="utf-8")
    return folder.report


def run_page(result: RunResult) -> str:
    summary = result.summary
    verdict = None if not summary.slo else ("SLO met" if summary.passed else "SLO missed")
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(result.target.zero_unix_s))
    return render(
        title=f"{result.target.model} under load",
        subtitle=f"{started}, {summary.duration_s:.0f} s",
        verdict=verdict,
        passed=summary.passed,
        header=header_lines(result),
        notes=[*warnings_of(result), *result.target.notes],
        tables=tables_of(summary),
        plots=all_plots(result),
    )


def comparison_page(comparison: Comparison, plots: Sequence[Plot]) -> str:
    return render(
        title=f"{comparison.first} against {comparison.second}",
        subtitle=f"{comparison.level:.0%} confidence intervals, {comparison.resamples:,} resamples",
        verdict=None,
        passed=True,
        header=[],
        notes=comparison.notes,
        tables=[comparison.table()],
        plots=plots,
    )


def render(
    *,
    title: str,
    subtitle: str,
    verdict: str | None,
    passed: bool,
    header: Sequence[tuple[str, str]],
    notes: Sequence[str],
    tables: Sequence[Table],
    plots: Sequence[Plot],
) -> str:
    """Fill the page; figures become SVG images inside it."""
    return _TEMPLATES.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        passed=passed,
        header=header,
        notes=notes,
        tables=tables,
        plots=[
            (plot.title, plot.caption, None if plot.figure is None else svg_data_uri(plot.figure))
            for plot in plots
        ],
        definitions=_DEFINITIONS,
    )
