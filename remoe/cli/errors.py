"""Errors as a user should meet them: one line that says what to do, and an exit status."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from remoe.errors import RemoeError

__all__ = ["OneLineErrors"]


class OneLineErrors(TyperGroup):
    """A command group that prints what a user can mend instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except RemoeError as error:
            message = error.message
        except ModuleNotFoundError as error:
            message = (
                f"the package {error.name} is missing; install it with `pip install 'remoe[all]'`"
            )
        except OSError as error:
            message = f"{error.strerror or error}" + (
                f": {error.filename}" if error.filename else ""
            )
        typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
        typer.echo(message, err=True)
        raise typer.Exit(1)
