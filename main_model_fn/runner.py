"""The seam between the engine and what runs its streams through the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from main_model_fn.stream import Stream

__all__ = ["EngineLimits", "Runner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Sizes of the key-value cache and of a step, in tokens and requests."""

    kv_tokens: int
    page_tokens: int
    batch_tokens: int
    max_requests: int
    max_queue: int


class Runner(Protocol):
    """Runs streams through a model in a thread of its own, and fills them.

    Its other methods are called from the event loop and do not wait for the model.
    """

    def start(self) -> None: ...

    def stop(self) -> None:
        """End the thread; streams that are not done fail."""
        ...

    @property
    def alive(self) -> bool: ...

    def submit(self, stream: Stream) -> None:
        """Queue a stream."""
        ...

    def cancel(self, stream: Stream) -> None:
        """Free what an unfinished stream holds, after the step under way."""
        ...
