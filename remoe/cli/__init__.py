"""The `remoe` command. One module per command group; what is heavy is imported when it is used."""

from __future__ import annotations

import typer

from remoe.cli.bill import bill
from remoe.cli.cluster import destroy, preflight, rollback
from remoe.cli.deploy import deploy, diff
from remoe.cli.down import down
from remoe.cli.errors import OneLineErrors
from remoe.cli.evaluate import evaluate
from remoe.cli.history import history_app
from remoe.cli.key import key_app
from remoe.cli.load import load_app
from remoe.cli.logs import logs
from remoe.cli.model import model_app
from remoe.cli.plan import plan
from remoe.cli.profile import profile_app
from remoe.cli.status import status
from remoe.cli.up import up

__all__ = ["app"]

app = typer.Typer(
    name="remoe",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Serve a Mixture-of-Experts model whose cold experts sleep in functions of their own.\n\n"
        "Start with [bold]remoe up[/bold]; it says what to do next."
    ),
)

app.command()(up)
app.command()(status)
app.command()(plan)
app.command()(logs)
app.command()(down)
app.command()(bill)
app.command()(evaluate)
app.command()(deploy)
app.command()(diff)
app.command()(rollback)
app.command()(destroy)
app.command()(preflight)
app.add_typer(key_app, name="key")
app.add_typer(load_app, name="load")
app.add_typer(model_app, name="model")
app.add_typer(profile_app, name="profile")
app.add_typer(history_app, name="history")


@app.command()
def version() -> None:
    """Print the version."""
    from remoe import __version__

    typer.echo(__version__)
