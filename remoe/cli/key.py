"""`remoe key`: who may ask, for what, how often, and for how much."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

import typer

from remoe.cli.bill import LedgerUrl, dollars, ledger_option

__all__ = ["key_app"]

key_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")


@key_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for; for people.")],
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model the key may use; may be given again.", show_default="all"),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Most requests a minute.", show_default="no limit")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens a minute, both ways.", show_default="no limit"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="USD",
            help="Most dollars a day, in UTC, by the busy ledger.",
            show_default="no limit",
        ),
    ] = None,
    ledger: LedgerUrl = None,
) -> None:
    """Make a key and print it, once: only its hash is kept.

    Whoever runs the gateway on loopback needs none; see `remoe up --help` for other addresses.
    """
    from remoe.accounts.database import open_database
    from remoe.accounts.keys import create_key

    engine = open_database(ledger_option(ledger))
    try:
        key, secret = create_key(
            engine,
            name,
            models=model or None,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            nano_usd_per_day=_nano_usd(budget),
        )
    finally:
        engine.dispose()
    typer.echo(f"{key.id} for {name}. This is shown once:", err=True)
    typer.echo(secret)


@key_app.command("list")
def list_(
    revoked: Annotated[bool, typer.Option("--all", help="Revoked ones too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ledger: LedgerUrl = None,
) -> None:
    """List the keys and what they may do; the keys themselves are not kept."""
    import time

    from remoe.accounts.bill import spent_nano_usd
    from remoe.accounts.database import open_database
    from remoe.accounts.entries import day_of
    from remoe.accounts.keys import list_keys

    engine = open_database(ledger_option(ledger), create=False)
    try:
        keys = list_keys(engine, revoked=revoked)
        spent = spent_nano_usd(engine, day_of(time.time()))
    finally:
        engine.dispose()
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(keys), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("key", "name", "models", "requests/min", "tokens/min", "budget/day", "today"):
        table.add_column(column, no_wrap=True)
    for key in keys:
        table.add_row(
            key.id,
            key.name,
            "all" if key.models is None else ", ".join(key.models),
            _limit(key.requests_per_minute),
            _limit(key.tokens_per_minute),
            "-" if key.nano_usd_per_day is None else dollars(key.nano_usd_per_day),
            dollars(spent.get(key.id, 0)),
            style="dim" if key.revoked_at_us else "",
        )
    Console().print(table)


@key_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, as `remoe key list` shows it.")],
    ledger: LedgerUrl = None,
) -> None:
    """End a key for good, within seconds; its requests stay in the ledger."""
    from remoe.accounts.database import open_database
    from remoe.accounts.keys import revoke_key

    engine = open_database(ledger_option(ledger), create=False)
    try:
        revoke_key(engine, key)
    finally:
        engine.dispose()
    typer.echo(f"{key} is revoked.")


def _limit(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _nano_usd(budget: str | None) -> int | None:
    if budget is None:
        return None
    try:
        nano = Decimal(budget.removeprefix("$")) * 1_000_000_000
        if nano > 0 and nano == int(nano):
            return int(nano)
    except (ArithmeticError, ValueError):
        pass
    raise typer.BadParameter(f"--budget is dollars above 0, such as 2.50, not '{budget}'")
