"""What is to be sent: arrivals joined with lengths, and the prompt of each made when it is due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from loadgen.trace import TracedRequest
from remoe.errors import SettingsError

__all__ = ["LengthLimits", "PlannedRequest", "Workload", "with_lengths"]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """`intended_s` counts from the run's zero; None in a closed loop."""

    index: int
    intended_s: float | None
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    topic: str | None = None
    stage: int = 0


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Fixed lengths win over the trace's; limits cut them to what the model can take."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """`cut` says how many requests were made shorter by the limits, `borrowed` how many took a
    length from another trace's rows."""

    requests: tuple[PlannedRequest, ...]
    cut: int
    borrowed: int

    @property
    def span_s(self) -> float:
        """The last intended arrival."""
        return max((request.intended_s or 0.0 for request in self.requests), default=0.0)


def with_lengths(
    arrivals: Iterable[tuple[float | None, int, TracedRequest | None]],
    lengths: Sequence[TracedRequest],
    limits: LengthLimits,
) -> Workload:
    """Join (intended_s, stage, traced request) with lengths, in order and from the start again.

    A traced request's own lengths come first, then those of `lengths`, whose rows without lengths
    are passed over. Raises SettingsError if there are none.
    """
    source = _usable(lengths, limits)
    requests: list[PlannedRequest] = []
    cut = borrowed = 0
    for index, (intended_s, stage, traced) in enumerate(arrivals):
        row = traced or TracedRequest(0.0)
        has_prompt = row.prompt is not None or row.prompt_tokens or limits.prompt_tokens
        if not (has_prompt and (row.output_tokens or limits.output_tokens)):
            drawn = next(source, None)
            borrowed += traced is not None
            if drawn is None:
                raise SettingsError(
                    "the trace has arrivals but no token counts; pass --lengths with a trace that "
                    "has them, or --prompt-tokens and --output-tokens"
                )
            row = replace(
                row,
                prompt_tokens=drawn.prompt_tokens if row.prompt is None else row.prompt_tokens,
                output_tokens=drawn.output_tokens
                if row.output_tokens is None
                else row.output_tokens,
            )
        wanted_prompt = limits.prompt_tokens or row.prompt_tokens or 1
        wanted_output = limits.output_tokens or row.output_tokens or 1
        prompt_tokens = min(wanted_prompt, limits.max_prompt_tokens or wanted_prompt)
        output_tokens = min(wanted_output, limits.max_output_tokens or wanted_output)
        cut += (prompt_tokens, output_tokens) != (wanted_prompt, wanted_output)
        requests.append(
            PlannedRequest(
                index, intended_s, prompt_tokens, output_tokens, row.prompt, row.topic, stage
            )
        )
    return Workload(tuple(requests), cut, borrowed)


def _usable(lengths: Sequence[TracedRequest], limits: LengthLimits) -> Iterator[TracedRequest]:
    if limits.prompt_tokens and limits.output_tokens:
        return cycle([TracedRequest(0.0, limits.prompt_tokens, limits.output_tokens)])
    usable = [
        row for row in lengths if row.prompt_tokens is not None and row.output_tokens is not None
    ]
    return cycle(usable)
