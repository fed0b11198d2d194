"""`remoe evaluate`: make the papers' tables on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["evaluate"]


def evaluate(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            help="similarity, prediction, expert-time, cost, cold-start, replay, moeless, scaling.",
            show_default="all of them",
        ),
    ] = None,
    *,
    out: Annotated[
        Path, typer.Option(help="The results folder: data, figures and a page.", file_okay=False)
    ] = Path("results/evaluation"),
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="A model folder in Hugging Face format.", show_default="the default model"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a folder a set, each with prompts.jsonl(.gz): one object a line "
            "with `prompt` and `topic`.",
            show_default="the model's shipped history",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="A folder with AzureLLMInferenceTrace_code.csv and _conv.csv.",
            show_default="the trace that ships",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    hardware: Annotated[
        Path | None,
        typer.Option(
            help="A hardware profile to plan the default model with.",
            show_default="the newest of `remoe profile hardware`",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    host: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with a machine's figures, to model published models' shapes on.",
            show_default="one H100 and 16 cores",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Where the platform is started for a table.", min=1, max=65535)
    ] = 8400,
    requests: Annotated[
        int, typer.Option(help="Requests that the cost table measures end to end.", min=1)
    ] = 50,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter of everything: does it work?")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what the folder already has.")
    ] = False,
) -> None:
    """Make the papers' tables: ours beside theirs, with data and plots.

    What was measured is kept in the results folder; a run that was stopped goes on where it was.

    Examples:

    [bold]remoe evaluate similarity prediction --prompts prompt-sets[/bold]

    [bold]remoe evaluate --quick --out results/quick[/bold]
    """
    import time

    from rich.console import Console
    from rich.text import Text

    from evaluation.run import run_tables
    from evaluation.tables import chosen
    from evaluation.workbench import Options
    from remoe.cli.model import built_model

    wanted = chosen(list(tables or []))
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()

    def say(text: str) -> None:
        console.print(Text(f"{time.monotonic() - start:7.1f} s  {text}", "dim"))

    failures = run_tables(
        wanted,
        Options(
            out=out,
            model_dir=(model_dir or built_model()).absolute(),
            quick=quick,
            prompts=prompts,
            traces=traces,
            hardware=hardware,
            host=host,
            port=port,
            requests=requests,
            fresh=fresh,
        ),
        say,
    )
    typer.echo(f"{out / 'index.md'}")
    for failure in failures:
        typer.secho(f"{failure.table}: {failure.why}", fg=typer.colors.RED, err=True)
    if failures:
        raise typer.Exit(1)
