"""`remoe profile`: measure what the planner predicts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe.cli.errors import OneLineErrors

__all__ = ["profile_app"]

profile_app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help="Measure what the planner predicts from."
)


@profile_app.callback()
def _group() -> None:
    """Keep `activations` a sub-command while it is the only one."""


@profile_app.command("activations")
def activations(
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            help="A folder with a folder a set, each with prompts.jsonl(.gz): one object a line "
            "with `prompt` and `topic`.",
            exists=True,
            file_okay=False,
        ),
    ],
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="A model folder in Hugging Face format.", show_default="the default model"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The history to write.", show_default="history.npz in the model's folder"
        ),
    ] = None,
    per_set: Annotated[int, typer.Option(help="Most prompts of one set.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.", min=1)] = 1024,
    decode_tokens: Annotated[
        int, typer.Option(help="Most tokens that each prompt makes the model write.", min=0)
    ] = 48,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Take the rows that histories leave out.")
    ] = False,
) -> None:
    """Record which experts prompts activate, as the history that predictions rest on.

    Every prompt runs through the model, on the GPU if there is one, and is answered for some tokens:
    reading and writing use different experts. No text is kept.

    Example:

    [bold]remoe profile activations --prompts prompt-sets --model-dir my-moe[/bold]
    """
    from main_model_fn.activations import write_history
    from main_model_fn.prompt_sets import read_prompts
    from remoe.cli.model import built_model

    folder = model_dir or built_model()
    target = out or folder / "history.npz"
    count, topics = write_history(
        folder,
        read_prompts(prompts, per_set, held_out=held_out),
        target,
        max_tokens=max_tokens,
        decode_tokens=decode_tokens,
    )
    typer.echo(f"{count} prompts of {topics} topics in {target}")
