"""`remoe model`: build the default model, and say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe.cli.errors import OneLineErrors

__all__ = ["model_app", "model_cache"]

model_app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="Build the default model, SmolLM2-8x135M."
)

CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where models are kept.", show_default="REMOE_HOME or ~/.cache/remoe"),
]


def model_cache(cache_dir: Path | None) -> Path:
    """The folder that models are built in."""
    from remoe.home import remoe_home

    return cache_dir or remoe_home() / "models"


@model_app.command("build")
def build(cache_dir: CacheDir = None) -> None:
    """Build the default model if it is not there yet, and print its folder.

    Takes a few minutes and about 1.4 GB of disk the first time. Progress goes to standard error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from models.smollm2_8x135m.build import ensure_checkpoint

    console = Console(stderr=True)
    said: set[str] = set()
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("checking the model", total=1.0)

        def report(stage: str, share: float) -> None:
            progress.update(task, description=stage, completed=share)
            # Without a terminal there is no bar: say each stage once.
            if not console.is_terminal and stage not in said:
                said.add(stage)
                console.print(f"model: {stage}")

        folder = ensure_checkpoint(model_cache(cache_dir), report)
    typer.echo(folder)


@model_app.command("path")
def path(cache_dir: CacheDir = None) -> None:
    """Print the folder of the default model; fails if it is not built."""
    typer.echo(built_model(cache_dir))


def built_model(cache_dir: Path | None = None) -> Path:
    """The folder of the default model; raises CheckpointError if it is not built."""
    from models.smollm2_8x135m.build import default_inputs, is_intact
    from remoe.errors import CheckpointError

    inputs = default_inputs()
    digest = inputs.digest()
    folder = (
        model_cache(cache_dir).expanduser() / f"{inputs.name}-{digest.removeprefix('sha256:')[:12]}"
    )
    if not is_intact(folder, digest):
        raise CheckpointError(f"{folder} is not built yet; `remoe model build` makes it")
    return folder
