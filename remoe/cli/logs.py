"""`remoe logs`."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from remoe.errors import SettingsError, UnavailableError

__all__ = ["logs"]

_POLL_S = 0.2


def logs(
    function: Annotated[
        str | None,
        typer.Argument(help="A function's name or a part of it; all functions if left out."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C or `remoe down`.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Last lines to show.", min=0)] = 50,
) -> None:
    """Show what functions wrote, each line with its replica's name.

    Example: [bold]remoe logs main -f[/bold]
    """
    from knative.local.run_dir import RunDir
    from remoe.home import remoe_home

    run_dir = RunDir(remoe_home())
    if run_dir.running_pid() is None:
        raise UnavailableError(
            "Remoe is not running, and logs go with it. Start it with `remoe up`; "
            "`remoe up --keep-logs DIR` keeps them."
        )
    paths = matching_logs(run_dir.logs, function)
    try:
        _show(paths, lines, follow=follow, running=lambda: run_dir.running_pid() is not None)
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(0) from None


def matching_logs(folder: Path, function: str | None) -> list[Path]:
    """Log files of the functions that a name or a part of one means; an exact name wins."""
    paths = sorted(folder.glob("*.log"), key=lambda path: path.stem)
    if function is None:
        return paths
    exact = [path for path in paths if path.stem == function]
    partial = [path for path in paths if function in path.stem]
    if not partial:
        names = ", ".join(path.stem for path in paths)
        raise SettingsError(f"no function is called {function!r}; there are {names}")
    return exact or partial


def _show(paths: list[Path], lines: int, *, follow: bool, running: object) -> None:
    files: dict[Path, BinaryIO] = {path: path.open("rb") for path in paths}
    try:
        for file in files.values():
            for line in deque(file, maxlen=lines):
                typer.echo(line, nl=False)
        while follow and callable(running) and running():
            if not any([_pass_on(path, files) for path in paths]):  # noqa: C419
                time.sleep(_POLL_S)
    finally:
        for file in files.values():
            file.close()


def _pass_on(path: Path, files: dict[Path, BinaryIO]) -> bool:
    data = files[path].read()
    if data:
        typer.echo(data, nl=False)
        return True
    # The file was rotated away: go on with the new one.
    if path.exists() and path.stat().st_size < files[path].tell():
        files[path].close()
        files[path] = path.open("rb")
    return False
