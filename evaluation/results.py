"""What a table comes to: figures beside the paper's, series of data, pictures, and what to know."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["Cell", "Comparison", "Picture", "Series", "TableResult", "write_result"]

Cell = str | int | float | bool | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One claim: what the paper says of it, what came out here, and why the two may differ.

    `paper` is None where the paper has no figure. `same_setting` says whether the two were had in
    the same way; `gap` names the cause of the difference, or what is another setting.
    """

    what: str
    paper: str | None
    ours: str
    same_setting: bool
    gap: str


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of data with named columns; units are in the names. Written as NAME.csv."""

    name: str
    columns: list[str]
    rows: list[list[Cell]]

    def column(self, name: str) -> list[Cell]:
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers, float64 [rows]; what is missing is NaN."""
        return np.array([np.nan if value is None else value for value in self.column(name)], float)

    def named(self) -> list[dict[str, Cell]]:
        """The rows, each by its columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Picture:
    """Written as NAME.svg; the caption says what is to be seen."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class TableResult:
    """`notes` are what a reader must know to judge the figures."""

    comparisons: list[Comparison]
    series: list[Series]
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_result(
    result: TableResult, folder: Path, *, name: str, title: str, facts: dict[str, Cell]
) -> None:
    """Write result.json, table.md, a CSV for each series and an SVG for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "table": name,
        "title": title,
        "facts": facts,
        "comparisons": result.comparisons,
        "series": result.series,
        "notes": result.notes,
    }
    (folder / "result.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
    )
    for series in result.series:
        with (folder / f"{series.name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(series.columns)
            rows.writerows(series.rows)
    for picture in result.pictures:
        picture.figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
    (folder / "table.md").write_text(_page(result, title, facts), encoding="utf-8")


def _page(result: TableResult, title: str, facts: dict[str, Cell]) -> str:
    lines = [f"# {title}", "", *comparison_lines(result.comparisons), ""]
    for picture in result.pictures:
        lines += [f"![{picture.caption}]({picture.name}.svg)", "", picture.caption, ""]
    for series in result.series:
        if len(series.rows) <= _SHOWN_ROWS:
            lines += [f"`{series.name}.csv`", "", *_series_lines(series), ""]
        else:
            lines += [f"`{series.name}.csv` has {len(series.rows)} rows.", ""]
    lines += [f"- {note}" for note in result.notes]
    lines += ["", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines)


_SHOWN_ROWS = 40


def comparison_lines(comparisons: list[Comparison]) -> list[str]:
    """The comparisons as a Markdown table."""
    lines = [
        "| | paper | ours | same setting? | difference |",
        "|---|---|---|---|---|",
    ]
    for one in comparisons:
        same = "yes" if one.same_setting else "no"
        lines.append(f"| {one.what} | {one.paper or '-'} | {one.ours} | {same} | {one.gap} |")
    return lines


def _series_lines(series: Series) -> list[str]:
    return [
        f"| {' | '.join(series.columns)} |",
        f"|{'---|' * len(series.columns)}",
        *(f"| {' | '.join(_cell(value) for value in row)} |" for row in series.rows),
    ]


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
