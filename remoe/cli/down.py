"""`remoe down`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["down"]


def down(
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for requests in flight to finish.", min=0.1)
    ] = 60.0,
) -> None:
    """Stop the running platform: drain what is in flight, then leave nothing behind."""
    from knative.local.control import ask_stop
    from knative.local.run_dir import RunDir
    from remoe.home import remoe_home

    ask_stop(RunDir(remoe_home()).control, timeout_s=timeout)
    typer.echo("Remoe has stopped.")
