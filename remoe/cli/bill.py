"""`remoe bill`: what was used and what it cost, exact to the nano-dollar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from remoe.accounts.bill import Bill, BillLine

__all__ = ["bill", "ledger_option"]

_DAY = r"^\d{4}-\d{2}-\d{2}$"


def ledger_option(url: str | None) -> str:
    """The ledger a command works on: the option, or where `remoe up` keeps it."""
    from remoe.home import default_ledger_url

    return url or default_ledger_url()


LedgerUrl = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        envvar="REMOE_GATEWAY_LEDGER",
        help="The ledger's database URL.",
        show_default="ledger.db in REMOE_HOME",
    ),
]


def bill(
    *,
    by: Annotated[
        Literal["key", "model", "day"], typer.Option(help="What a line of the bill is.")
    ] = "day",
    since: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="First day, in UTC.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="Last day, in UTC.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ledger: LedgerUrl = None,
) -> None:
    """Add up what requests used and cost.

    The busy ledger (memory x time at work) is what is charged. The resident one (memory x time
    held, keep-alive and cold starts included) says what it took to be there.
    """
    from remoe.accounts.bill import make_bill
    from remoe.accounts.database import open_database

    for name, day in (("--since", since), ("--until", until)):
        _check_day(name, day)
    if as_csv and as_json:
        raise typer.BadParameter("choose one of --csv and --json")
    engine = open_database(ledger_option(ledger), create=False)
    try:
        made = make_bill(engine, by=by, since=since, until=until)
    finally:
        engine.dispose()
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(made), indent=2))
    elif as_csv:
        _write_csv(made)
    else:
        from rich.console import Console

        console = Console()
        console.print(_table(made, console.width))
        if made.keep_alive_kb_s:
            console.print(
                f"Memory held while there was no request: {made.keep_alive_kb_s / 1e6:,.3f} GB·s, "
                f"{dollars(made.keep_alive_nano_usd)} resident, in no line above.",
                style="dim",
            )


def dollars(nano_usd: int) -> str:
    """All nine decimals, so that what is printed adds up."""
    whole, rest = divmod(abs(nano_usd), 1_000_000_000)
    return f"{'-' if nano_usd < 0 else ''}${whole:,}.{rest:09d}"


def _check_day(name: str, day: str | None) -> None:
    import datetime as dt

    if day is None:
        return
    try:
        valid = dt.date.fromisoformat(day).isoformat() == day
    except ValueError:
        valid = False
    if not valid:
        raise typer.BadParameter(f"{name} is a day as YYYY-MM-DD, not '{day}'")


def _write_csv(made: Bill) -> None:
    """Lines, then the total; whole kB·s and nano-dollars, which spreadsheets add exactly."""
    import csv

    from remoe.accounts.bill import BillLine

    fields = [made.by if name == "name" else name for name in BillLine.__struct_fields__]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(fields)
    for line in (*made.lines, made.total):
        writer.writerow([getattr(line, name) for name in BillLine.__struct_fields__])


def _table(made: Bill, width: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = _COLUMNS if width >= _WIDTH_FOR_ALL else _NARROW_COLUMNS
    for name in columns:
        right = name != "name"
        table.add_column(
            name if right else made.by, justify="right" if right else "left", no_wrap=True
        )
    for line in made.lines:
        table.add_row(*(_COLUMNS[name](line) for name in columns))
    table.add_row(*(_COLUMNS[name](made.total) for name in columns), style="bold")
    if made.total.unmetered:
        table.caption = (
            f"{made.total.unmetered} requests are unmetered: they were broken off, and what they "
            "used is not known."
        )
    return table


def _gb_s(kb_s: int) -> str:
    return f"{kb_s / 1e6:,.3f}"


_COLUMNS: dict[str, Callable[[BillLine], str]] = {
    "name": lambda line: line.name,
    "requests": lambda line: f"{line.requests:,}",
    "tokens in": lambda line: f"{line.prompt_tokens:,}",
    "out": lambda line: f"{line.completion_tokens:,}",
    "GPU GB·s": lambda line: _gb_s(line.main_gpu_kb_s),
    "CPU GB·s": lambda line: _gb_s(line.main_cpu_kb_s),
    "remote GB·s": lambda line: _gb_s(line.remote_kb_s),
    "cost": lambda line: dollars(line.total_nano_usd),
    "resident": lambda line: dollars(line.resident_nano_usd),
}
_NARROW_COLUMNS = ("name", "requests", "out", "cost", "resident")
_WIDTH_FOR_ALL = 130
