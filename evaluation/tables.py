"""The tables there are, by name, in the order of the papers; each is loaded when it is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from evaluation.results import TableResult
from evaluation.workbench import Workbench
from remoe.errors import SettingsError

__all__ = ["TABLES", "Table", "chosen"]


@dataclass(frozen=True, slots=True)
class Table:
    """`module` has `make(bench) -> TableResult`; `needs` says what must run or be there."""

    name: str
    title: str
    module: str
    needs: str = ""

    def make(self, bench: Workbench) -> TableResult:
        maker: Callable[[Workbench], TableResult] = importlib.import_module(self.module).make
        return maker(bench)


TABLES = (
    Table("similarity", "Similar prompts activate similar experts", "evaluation.similarity"),
    Table("prediction", "Predicting activations, and how fast", "evaluation.prediction"),
    Table("expert-time", "Expert time by memory and by remote ratio", "evaluation.expert_time"),
    Table("cost", "Cost of a request", "evaluation.cost", "starts the platform on --port"),
    Table("cold-start", "Cold start by stage", "evaluation.cold_start", "starts functions"),
    Table("replay", "Real traffic, replayed", "evaluation.replay", "starts the platform on --port"),
    Table("moeless", "Balanced experts under load", "evaluation.moeless"),
    Table("scaling", "Thousands of experts", "evaluation.scaling"),
)


def chosen(names: list[str]) -> list[Table]:
    """The tables of these names, in the papers' order; all of none. SettingsError for others."""
    known = [table.name for table in TABLES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(
            f"there is no table {', '.join(unknown)}. There are {', '.join(known)}."
        )
    return [table for table in TABLES if not names or table.name in names]
