"""A word on standard error where the compiled kernel is missing or stale: all still works, slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["warn_without_native_kernel"]


def warn_without_native_kernel(library: Path | None = None) -> None:
    """Of this machine's library, if no other is named."""
    from remoe.kernel.native_library import native_problem

    problem = native_problem(library)
    if problem is not None:
        typer.secho(
            f"WARNING: {problem}. Until then torch and numpy compute, several times slower.",
            fg=typer.colors.YELLOW,
            bold=True,
            err=True,
        )
