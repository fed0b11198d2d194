"""`remoe profile`: measure what the planner predicts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe.cli.errors import OneLineErrors

if TYPE_CHECKING:
    from remoe.moeless.gates import GatesFacts

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


@profile_app.command("gates")
def gates(
    *,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A folder of prompt sets, as for `remoe profile activations`.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="A folder kept by --keep-recording, instead of prompts.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="A model folder in Hugging Face format.", show_default="the default model"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write.", show_default="moeless in the model's folder"),
    ] = None,
    per_set: Annotated[int, typer.Option(help="Most prompts of one set.", min=1)] = 12,
    max_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.", min=1)] = 256,
    decode_tokens: Annotated[
        int, typer.Option(help="Most tokens that each prompt makes the model write.", min=0)
    ] = 24,
    distances: Annotated[int, typer.Option(help="Predict up to so many layers ahead.", min=1)] = 5,
    threshold: Annotated[
        float, typer.Option(help="Copies less accurate than this are fine-tuned.", min=0, max=1)
    ] = 0.8,
    keep_recording: Annotated[
        Path | None, typer.Option(help="Keep what was recorded in this folder.")
    ] = None,
) -> None:
    """Make the gate copies that foretell each expert's load some layers ahead (MoEless).

    Prompts run through the model, on the GPU if there is one, and what each layer's gate is given
    and chooses is recorded. A later gate's copy is profiled on it, and fine-tuned where it is not
    accurate enough. Gates, their digests and their measured accuracy are kept beside the model.

    Example:

    [bold]remoe profile gates --prompts prompt-sets[/bold]
    """
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from main_model_fn.gate_recording import record_model
    from main_model_fn.gate_training import make_gate_copies
    from main_model_fn.prompt_sets import read_prompts
    from remoe.cli.model import built_model
    from remoe.moeless.gates import GATES_FOLDER
    from remoe.moeless.recording import Recording

    if (prompts is None) == (recording is None):
        raise typer.BadParameter("give either --prompts or --recording")
    folder = model_dir or built_model()
    console = Console(stderr=True)
    with ExitStack() as stack:
        if recording is not None:
            recorded = Recording.read(recording)
        else:
            assert prompts is not None  # noqa: S101 (checked above)
            target = keep_recording or Path(stack.enter_context(TemporaryDirectory()))
            console.print("recording", style="dim")
            recorded = record_model(
                folder,
                read_prompts(prompts, per_set),
                target,
                max_tokens=max_tokens,
                decode_tokens=decode_tokens,
            )
        with console.status("training") as status:
            copies = make_gate_copies(
                recorded,
                out or folder / GATES_FOLDER,
                distances=range(1, distances + 1),
                threshold=threshold,
                report=lambda done, layers: status.update(f"training: layer {done} of {layers}"),
            )
    typer.echo(quality_table(copies.facts))


def quality_table(facts: GatesFacts) -> str:
    """Accuracy by distance, the mean over layers, plain copies and those kept."""
    lines = ["distance  plain  kept   tuned layers"]
    for distance in facts.distances:
        rows = [row for row in facts.quality if row.distance == distance]
        plain = sum(row.plain_overlap for row in rows) / len(rows)
        kept = sum(row.overlap for row in rows) / len(rows)
        tuned = sum(row.tuned for row in rows)
        lines.append(f"{distance:8}  {plain:.3f}  {kept:.3f}  {tuned} of {len(rows)}")
    return "\n".join(lines)


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
    calls: Annotated[
        Path | None,
        typer.Option(
            help="Times of calls that were measured on a cluster, by `python -m "
            "main_model_fn.call_times` in its main function's container.",
            show_default="measured here",
        ),
    ] = None,
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
    from remoe.cli.native_warning import warn_without_native_kernel
    from remoe.hardware import CallTimes
    from remoe.home import remoe_home

    warn_without_native_kernel()
    folder = (model_dir or built_model()).absolute()
    console = Console(stderr=True)
    measured_calls = CallTimes.load(calls) if calls else None
    profile = measure_hardware(
        folder,
        model_name(folder),
        seconds=seconds,
        report=lambda stage: console.print(f"measuring: {stage}", style="dim"),
        calls=measured_calls,
    )
    path = profile.save(remoe_home())
    if plot is not None:
        draw(profile, plot)
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"))
        return
    Console().print(profile_table(profile))
    typer.echo(f"kept in {path}")
