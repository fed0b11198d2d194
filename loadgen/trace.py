"""A trace: who arrives when, with how many tokens; and which part of it is replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from remoe.errors import SettingsError

__all__ = ["ReadOptions", "Selection", "TraceError", "TracedRequest"]


class TraceError(SettingsError):
    """A line that cannot be read; the message has the file, the line number, and what is wrong."""

    code = "trace"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """`arrival_s` counts from the first request of the trace, which is not at its file's zero.

    Token counts are None where a trace has arrivals only; `prompt` is None where it has no text.
    """

    arrival_s: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    prompt: str | None = None
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader may use: traces of rates draw arrivals by `seed`, and skip to `start_s`."""

    seed: int = 0
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a trace to replay, in this order: window, sample, count, speed.

    `start_s` and `end_s` are trace time; the first kept second becomes zero. `sample` keeps each
    request with that probability; which ones depends on `seed` and on nothing else, so that two
    systems meet the same requests, and a smaller sample is a part of a larger one. `speedup` 10
    replays an hour in six minutes.
    """

    start_s: float = 0.0
    end_s: float | None = None
    sample: float = 1.0
    max_requests: int | None = None
    speedup: float = 1.0
    seed: int = 0

    def apply(self, requests: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
        """Yield what is kept, with arrivals in replay time. The trace must be sorted by time."""
        end_s = float("inf") if self.end_s is None else self.end_s
        window = takewhile(lambda request: request.arrival_s < end_s, requests)
        return islice(self._kept(window), self.max_requests)

    def _kept(self, requests: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
        chances = np.random.default_rng([self.seed, 0x5A])
        for request in requests:
            # Drawn for every request of the file: a window does not change who is sampled.
            chance = chances.random()
            if request.arrival_s >= self.start_s and chance < self.sample:
                yield TracedRequest(
                    (request.arrival_s - self.start_s) / self.speedup,
                    request.prompt_tokens,
                    request.output_tokens,
                    request.prompt,
                    request.topic,
                )
