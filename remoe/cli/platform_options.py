"""The options of a platform that are the same on this machine and on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["LayersPerFunction", "MainRetention", "Window"]

LayersPerFunction = Annotated[
    int, typer.Option(help="Decoder layers that one expert function holds.", min=1)
]
Window = Annotated[
    str, typer.Option(help="An expert function sleeps after this long without a call.")
]
MainRetention = Annotated[
    str, typer.Option(help="The main function sleeps after this long, plus its window.")
]
