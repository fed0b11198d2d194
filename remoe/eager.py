"""Tasks that take their first step at once, which Python itself offers from 3.12 on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

__all__ = ["start_now"]

_T = TypeVar("_T")


def start_now(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _T]
) -> asyncio.Task[_T]:
    """Run a coroutine as a task, up to where it first waits before this returns.

    Else it would stand behind all that the event loop has to do by then. From a callback of the loop,
    that is: within a task, since two cannot be under way at once, it starts as any other.
    """
    if asyncio.current_task(loop) is not None:
        return loop.create_task(coroutine)
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    steps: list[Callable[[], object]] = []

    def keep(step: Callable[..., object], *_: object, context: Context) -> None:
        steps.append(lambda: context.run(step))

    # A new task asks its loop to run its first step soon, and does nothing else.
    loop.call_soon = keep  # type: ignore[method-assign, assignment]
    try:
        task = loop.create_task(coroutine)
    finally:
        del loop.call_soon
    for step in steps:
        step()
    return task
