"""`remoe deploy` and `remoe diff`: a model on a cluster, and what would change of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from remoe.cli.cluster_options import Context, Described, describes_release

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from knative.cluster.diff import Change
    from knative.cluster.releases import Expectation

__all__ = ["deploy", "diff"]

_COLOURS = {
    "created": typer.colors.GREEN,
    "changed": typer.colors.YELLOW,
    "removed": typer.colors.RED,
}


@describes_release
def deploy(
    described: Described,
    *,
    context: Context = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Let the cluster check everything, and change nothing."),
    ] = False,
    output: Annotated[
        Literal["yaml", "helm-values"] | None,
        typer.Option("--output", "-o", help="Print what would be applied, and ask no cluster."),
    ] = None,
    kustomize: Annotated[
        Path | None, typer.Option(help="Write a Kustomize base into this folder instead.")
    ] = None,
    create_namespace: Annotated[
        bool, typer.Option("--create-namespace", help="Make the namespace if it is missing.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until all is ready; 0 does not wait.", min=0)
    ] = 300.0,
) -> None:
    """Put a model on a Kubernetes cluster with Knative Serving; run it again to change it.

    Applies only what differs: where nothing changed, no function gets a new Revision. See first
    what would change with `remoe diff`, and what the cluster lacks with `remoe preflight`.

    Examples:

    [bold]remoe deploy ~/models/mixtral --weights claim:models/mixtral --dry-run[/bold]

    [bold]remoe deploy ~/models/mixtral --weights claim:models/mixtral --slo ttft=2,tpot=0.1[/bold]
    """
    from knative.cluster.api import Cluster
    from knative.cluster.deploying import apply_release, wait_ready
    from knative.cluster.files import helm_values, write_kustomize, yaml_text

    release = described.release
    if output == "yaml":
        typer.echo(yaml_text(release.objects), nl=False)
        return
    if output == "helm-values":
        typer.echo(helm_values(release), nl=False)
        return
    if kustomize is not None:
        for path in write_kustomize(release, kustomize):
            typer.echo(path)
        return
    with Cluster.connect(context=context) as cluster:
        cluster.need_namespace(release.namespace, create=create_namespace, dry_run=dry_run)
        for one in apply_release(
            cluster,
            release.objects,
            namespace=release.namespace,
            expectation=described.expectation,
            dry_run=dry_run,
        ):
            typer.secho(f"{one.outcome:>9}  {one.kind} {one.name}", fg=_COLOURS.get(one.outcome))
        if dry_run:
            typer.echo("Dry run: the cluster would take all of this, and nothing was changed.")
            return
        if timeout:
            wait_ready(
                cluster,
                [one["metadata"]["name"] for one in release.services],
                release.namespace,
                timeout_s=timeout,
                on_ready=lambda name, after_s: typer.echo(f"{after_s:7.1f} s  {name} is ready"),
            )
    typer.echo(
        f"{release.model} is at {release.topology.gateway_url}/v1. See it with `remoe status "
        f"--namespace {release.namespace}`, take it back with `remoe rollback`."
    )


@describes_release
def diff(
    described: Described,
    *,
    context: Context = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if anything would change.")
    ] = False,
) -> None:
    """Show, field by field, what `remoe deploy` with the same options would change.

    With a hardware profile also what latency and cost the planner expects, before and after.
    """
    from rich.console import Console

    from knative.cluster.api import Cluster
    from knative.cluster.diff import release_changes
    from knative.cluster.releases import kept_releases

    release = described.release
    with Cluster.connect(context=context) as cluster:
        changes = list(release_changes(cluster, release.objects, namespace=release.namespace))
        kept = kept_releases(cluster, release.namespace)
    console = Console()
    console.print(_changes_table(changes))
    before, after = kept[-1].expectation if kept else None, described.expectation
    if before is not None or after is not None:
        console.print(_expectation_table(before, after))
    else:
        console.print("Without a hardware profile (`remoe profile hardware`) nothing is predicted.")
    if changes and exit_code:
        raise typer.Exit(1)


def _changes_table(changes: Sequence[Change]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not changes:
        return Text("Nothing would change.")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("object", "field", "runs", "would be"):
        table.add_column(name, overflow="fold")
    for change in changes:
        table.add_row(
            f"{change.kind} {change.name}",
            change.path,
            Text(change.before or "-", "red"),
            Text(change.after or "-", "green"),
        )
    return table


def _expectation_table(before: Expectation | None, after: Expectation | None) -> RenderableType:
    from rich.table import Table

    known = after or before
    length = f"{known.prompt_tokens} tokens in, {known.output_tokens} out" if known else ""
    table = Table(
        title=f"A usual request, {length}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for name in ("predicted", "runs", "would be", "change"):
        table.add_column(name)
    rows = (
        ("first token, s", "ttft_s"),
        ("each further token, s", "tpot_s"),
        ("cost, USD", "cost_usd"),
    )
    for label, field in rows:
        old, new = (getattr(side, field) if side is not None else None for side in (before, after))
        change = f"{100 * (new / old - 1):+.1f} %" if old and new else "-"
        table.add_row(label, *("-" if one is None else f"{one:.3g}" for one in (old, new)), change)
    return table
