"""`remoe rollback`, `remoe destroy` and `remoe preflight`: the rest of a deployment's life."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe.cli.cluster_options import Context, Described, Namespace, describes_release

__all__ = ["destroy", "preflight", "rollback"]


def rollback(
    *,
    namespace: Namespace = "remoe",
    context: Context = None,
    to: Annotated[
        int | None, typer.Option(help="A release's number.", show_default="the one before")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until all is ready; 0 does not wait.", min=0)
    ] = 300.0,
) -> None:
    """Apply an earlier release again; streams that run are finished by the pods they are on."""
    from knative.cluster.api import Cluster
    from knative.cluster.deploying import apply_release, wait_ready
    from knative.cluster.releases import release_before

    with Cluster.connect(context=context) as cluster:
        kept = release_before(cluster, namespace, to)
        typer.echo(f"back to release {kept.number}")
        for one in apply_release(
            cluster, kept.objects, namespace=namespace, expectation=kept.expectation
        ):
            typer.echo(f"{one.outcome:>9}  {one.kind} {one.name}")
        if timeout:
            services = [one["metadata"]["name"] for one in kept.objects if one["kind"] == "Service"]
            wait_ready(cluster, services, namespace, timeout_s=timeout)


def destroy(
    *,
    namespace: Namespace = "remoe",
    context: Context = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until the pods are gone.", min=0)
    ] = 300.0,
) -> None:
    """Remove everything that `remoe deploy` made; claims, your Secrets and the namespace stay."""
    from knative.cluster.api import Cluster
    from knative.cluster.deploying import destroy as remove
    from knative.cluster.deploying import wait_gone

    if not yes:
        typer.confirm(f"Remove everything of Remoe from namespace {namespace}?", abort=True)
    with Cluster.connect(context=context) as cluster:
        removed = False
        for one in remove(cluster, namespace):
            removed = True
            typer.echo(f"{one.outcome:>9}  {one.kind} {one.name}")
        if removed and timeout:
            wait_gone(cluster, namespace, timeout_s=timeout)
    if not removed:
        typer.echo(f"nothing of Remoe is in namespace {namespace}")


@describes_release
def preflight(described: Described, *, context: Context = None) -> None:
    """Check what a deployment needs of the cluster, and print the patch for all that is missing.

    Takes the options of `remoe deploy`. Exits with 1 if something is missing that must be there.
    """
    from knative.cluster.api import Cluster
    from knative.cluster.preflight import Needs, check

    needs = Needs(
        release=described.release,
        flags=described.flags,
        gpus=described.gpus,
        gpu_resource=described.gpu_resource,
        claims=described.claims,
    )
    marks = {True: "ok", False: "MISSING", None: "note"}
    colours = {True: typer.colors.GREEN, False: typer.colors.RED, None: typer.colors.YELLOW}
    missing = False
    with Cluster.connect(context=context) as cluster:
        for finding in check(cluster, needs):
            missing |= finding.ok is False
            typer.secho(f"{marks[finding.ok]:>7}", fg=colours[finding.ok], nl=False)
            typer.echo(f"  {finding.what}")
            if finding.fix and not finding.ok:
                typer.echo(f"         {finding.fix}")
    if missing:
        raise typer.Exit(1)
