"""How every plot looks: sizes, colours, axes; and a figure as SVG for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "ORANGE",
    "RED",
    "Plot",
    "figure",
    "label",
    "legend",
    "logarithmic",
    "svg_data_uri",
]

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#5b6169",
    "svg.hashsalt": "remoe",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture of a report; without a figure, `caption` says what is missing and why."""

    title: str
    caption: str
    figure: Figure | None


def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    height: float = 3.2,
    width: float = 9.0,
    sharex: bool = False,
) -> tuple[Figure, Sequence[Axes]]:
    """A figure without pyplot's global state, in the house style."""
    with mpl.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, sharex=sharex)
    return drawn, list(axes.flat)


def label(axes: Axes, x: str, y: str, title: str | None = None) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, fontsize=9.5, loc="left")


def legend(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", **options)


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks: 0.2, 0.5, 1, 2, 5, 10."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def svg_data_uri(drawn: Figure) -> str:
    """The figure as a `data:` URI, so that a page needs no other file."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        # No date, so that the same run gives the same page.
        drawn.savefig(buffer, format="svg", metadata={"Date": None}, dpi=130)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
