"""What surrounds a forward pass in any engine: metering before, and each stream's token after."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from main_model_fn.logprobs import token_logprob
from main_model_fn.metering import Span, StepMeter
from main_model_fn.prompt_scoring import PromptRows, PromptScorer
from main_model_fn.sampling import choose_token, takes_likeliest
from main_model_fn.stream import Stream

__all__ = ["Part", "Steps"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stream's rows in a step: its tokens from `position` on, prompt and generated alike.

    With `yields_token` the last of them is to be followed by a new one.
    """

    stream: Stream
    position: int
    rows: int
    yields_token: bool

    def span(self) -> Span:
        """What of it is billed as what. Rows that an engine computes again are not counted."""
        stream, end = self.stream, self.position + self.rows
        prompt_tokens = len(stream.request.prompt_tokens)
        fresh = min(max(stream.computed, self.position), end)
        return Span(
            meter=stream.meter,
            rows=self.rows,
            repeated=fresh - self.position,
            prefill=max(0, min(prompt_tokens, end) - fresh),
        )


class Steps:
    """Called from the engine's thread, by turns: `begin`, the model, `end`."""

    def __init__(self, scorer: PromptScorer, meter: StepMeter) -> None:
        self._meter = meter
        self._scorer = scorer
        self._yielding: list[Stream] = []

    def begin(self, parts: list[Part]) -> None:
        """Note the layout of the coming forward pass: the parts' rows, one part after another."""
        spans, wanted, row = [], [], 0
        for part in parts:
            spans.append(part.span())
            stream = part.stream
            stream.computed = max(stream.computed, part.position + part.rows)
            if stream.prompt_logprobs:
                wanted.append(PromptRows(stream, row, part.position, part.rows))
            row += part.rows
        self._scorer.expect(wanted)
        self._yielding = [part.stream for part in parts if part.yields_token]
        self._meter.begin_step(spans, time.monotonic())

    def end(self, logits: torch.Tensor) -> list[int]:
        """Choose each yielding stream's next token, and make it the row's argmax, in place.

        `logits` is float32 [rows, vocab], one row for each yielding part in order. Rows after
        those mean nothing: a batch in which nobody gets a token has one all the same.
        """
        tokens = logits.argmax(-1).tolist()
        chosen = []
        for row, stream in enumerate(self._yielding):
            sampling, top = stream.request.sampling, stream.request.logprobs
            token, logprob = tokens[row], None
            guide = stream.guide
            if top is not None or guide is not None or not takes_likeliest(sampling):
                scores = logits[row].numpy(force=True)
                left = scores if guide is None else guide.restrict(scores)
                token = choose_token(left, sampling, seed=stream.seed, generated=stream.tokens)
                logprob = None if top is None else token_logprob(scores, token, top)
                logits[row, token] = torch.inf
            chosen.append((stream, token, logprob))
        self._meter.end_step(time.monotonic())
        for stream, token, logprob in chosen:
            if stream.guide is not None and not stream.guide.accept(token):
                stream.fail()
            stream.add(token, logprob)
        return [token for _, token, _ in chosen]
