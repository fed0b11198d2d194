"""`remoe status`: what runs, what sleeps, and what it cost to wake."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from remoe.cli.cluster_options import Context

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.text import Text

    from remoe.runtime_status import FunctionStatus, RuntimeStatus

__all__ = ["status", "status_table"]

_REFRESH_S = 1.0
_STYLES = {
    "zero": "dim",
    "starting": "yellow",
    "ready": "green",
    "draining": "cyan",
    "backing off": "bold red",
}
_MIB = 1 << 20
_EVENTS_SHOWN = 5
# Narrower terminals lose the columns that can be missed.
_WIDTH_FOR_HOLDS = 140
_WIDTH_FOR_REQUESTS = 100


def status(
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print once, as JSON.")] = False,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace", "-n", help="Of a cluster.", show_default="what runs on this machine"
        ),
    ] = None,
    context: Context = None,
) -> None:
    """Show every function live: replicas, memory, cold starts, last call, state.

    Ctrl-C leaves. Without a terminal it prints once.
    """
    from remoe.errors import UnavailableError

    ask = _asks(namespace, context)
    current = ask()
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(current), indent=2))
        return

    from rich.console import Console

    console = Console()
    if once or not sys.stdout.isatty():
        console.print(status_table(current, console.width))
        return

    from rich.live import Live

    try:
        with Live(
            status_table(current, console.width), console=console, auto_refresh=False
        ) as live:
            while True:
                time.sleep(_REFRESH_S)
                live.update(status_table(ask(), console.width), refresh=True)
    except KeyboardInterrupt:
        return
    except UnavailableError:
        console.print("Remoe has stopped.")


def _asks(namespace: str | None, context: str | None) -> Callable[[], RuntimeStatus]:
    """Who is asked: the local supervisor, or a cluster's API server."""
    if namespace is None:
        from knative.local.control import ask_status
        from knative.local.run_dir import RunDir
        from remoe.home import remoe_home

        control = RunDir(remoe_home()).control
        return lambda: ask_status(control)

    from knative.cluster.api import Cluster
    from knative.cluster.status import namespace_status

    def ask() -> RuntimeStatus:
        with Cluster.connect(context=context) as cluster:
            return namespace_status(cluster, namespace)

    return ask


def status_table(current: RuntimeStatus, width: int) -> RenderableType:
    """The table, a line on how to read it, and the latest events."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{current.model} on {current.url}, up {_age(current.up_s)}",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    columns: list[tuple[str, bool, Callable[[FunctionStatus], str | Text]]] = [
        ("function", False, lambda f: f.name.removeprefix(f"{current.model}-")),
        ("holds", False, lambda f: Text(f.holds, "dim")),
        ("replicas", True, lambda f: f"{f.ready}/{f.desired}"),
        ("memory", True, _memory),
        ("requests", True, lambda f: str(f.requests)),
        ("cold starts", True, _cold_starts),
        ("last call", True, _last_call),
        ("state", False, _state),
    ]
    if width < _WIDTH_FOR_HOLDS:
        columns = [column for column in columns if column[0] != "holds"]
    if width < _WIDTH_FOR_REQUESTS:
        columns = [column for column in columns if column[0] != "requests"]
    for name, right, _ in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for function in current.functions:
        table.add_row(*(cell(function) for _, _, cell in columns))
    legend = "replicas: ready/desired · memory: MiB held + mapped from files · cold starts: last, spawn to ready"
    lines: list[RenderableType] = [table, Text(legend, "dim")]
    if current.events:
        lines.append(Text())
    lines += [
        Text(f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {event.text}", "dim")
        for event in current.events[-_EVENTS_SHOWN:]
    ]
    return Group(*lines)


def _state(function: FunctionStatus) -> Text:
    from rich.text import Text

    state = Text(function.state, _STYLES[function.state])
    troubles = _troubles(function)
    if troubles:
        state.append(f"  {troubles}", "red")
    if function.detail:
        state.append(f"  {function.detail[:60]}", "dim")
    return state


def _memory(function: FunctionStatus) -> str:
    if not function.replicas:
        return "-"
    return f"{function.memory_bytes / _MIB:.0f} + {function.mapped_bytes / _MIB:.0f}"


def _cold_starts(function: FunctionStatus) -> str:
    if function.cold_start_last_ms is None:
        return "-"
    return f"{function.cold_starts} ({function.cold_start_last_ms:.0f} ms)"


def _last_call(function: FunctionStatus) -> str:
    if function.last_call_s is None:
        return "-"
    return "now" if function.in_flight else _age(function.last_call_s)


def _troubles(function: FunctionStatus) -> str:
    counts = {
        "crash": function.crashes,
        "memory kill": function.memory_kills,
        "refused call": function.refused,
    }
    return ", ".join(
        f"{count} {name}{'' if count == 1 else 'es' if name == 'crash' else 's'}"
        for name, count in counts.items()
        if count
    )


def _age(duration_s: float) -> str:
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
