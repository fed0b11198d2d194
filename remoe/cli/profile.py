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


@profile_app.command("hardware")
def hardware(
    *,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="A model folder in Hugging Face format.", show_default="the default model"
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Spent on each time of an expert.", min=0.05, max=60)
    ] = 0.7,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the profile into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure this machine with a model, so that plans can be optimised before the first request.

    Takes about a minute: experts on at least six CPU allocations, calls and cold starts of real
    functions, and the model without its experts. The profile is kept in REMOE_HOME with its date;
    the next `remoe up` plans with it.

    Example:

    [bold]remoe profile hardware --plot hardware.png[/bold]
    """
    from rich.console import Console

    from knative.deployment import model_name
    from remoe.cli.hardware.measure import measure_hardware
    from remoe.cli.hardware.plot import draw
    from remoe.cli.hardware.table import profile_table
    from remoe.cli.model import built_model
    from remoe.home import remoe_home

    folder = (model_dir or built_model()).absolute()
    console = Console(stderr=True)
    profile = measure_hardware(
        folder,
        model_name(folder),
        seconds=seconds,
        report=lambda stage: console.print(f"measuring: {stage}", style="dim"),
    )
    path = profile.save(remoe_home())
    if plot is not None:
        draw(profile, plot)
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"))
        return
    Console().print(profile_table(profile))
    typer.echo(f"kept in {path}")
