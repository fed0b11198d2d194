"""One choice: tokens in, text out, ended by the model, by its limit, or by a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.detokenizer import Detokenizer
from gateway.receipt import ChoiceRecord
from gateway.replies import FinishReason
from gateway.stop import StopMatcher
from gateway.tool_calls import ParsedCall, ToolCallParser
from remoe.generation import GenerateEvent, TokenLogprob

__all__ = ["Choice", "Shown", "TokenPiece"]


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token with log-probabilities; `offset` is where its text begins, in characters.

    `scored` is None for the first token of a prompt, which nothing precedes.
    """

    token: int
    scored: TokenLogprob | None
    offset: int


@dataclass(slots=True)
class Shown:
    """What the client may see now; log-probabilities come no sooner than their token's text."""

    text: str = ""
    pieces: list[TokenPiece] = field(default_factory=list)
    calls: list[ParsedCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.pieces or self.calls)

    def extend(self, other: Shown) -> None:
        """Go on with what came next."""
        self.text += other.text
        self.pieces += other.pieces
        self.calls += other.calls


class Choice:
    """The state of one generation as the client sees it."""

    def __init__(
        self, detokenizer: Detokenizer, stops: tuple[str, ...], *, calls_tools: bool = False
    ) -> None:
        self.record = ChoiceRecord()
        self.finish: FinishReason | None = None
        self.shown = False
        """Whether any of it is on its way to the client; set by whoever sends it."""
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._parser = ToolCallParser() if calls_tools else None
        # Nothing looks at the text token by token.
        self._plain = not stops and not calls_tools
        self._held: deque[TokenPiece] = deque()
        # Characters of the whole text: of all tokens, and of those out of the stop matcher.
        self._decoded = 0
        self._passed = 0
        self._logprob_sum = 0.0
        self._called = False

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens; what `best_of` chooses by."""
        return self._logprob_sum / max(1, self.record.tokens)

    def echo(
        self,
        prompt: str,
        tokens: Sequence[int],
        scores: Sequence[TokenLogprob | None],
        detokenizer: Detokenizer,
    ) -> Shown:
        """Begin the text with the prompt, which no stop string is looked for in."""
        pieces = []
        if scores:
            offset = 0
            for token, scored in zip(tokens, scores, strict=True):
                pieces.append(TokenPiece(token, scored, min(offset, len(prompt))))
                offset += len(detokenizer.push(token))
        self._decoded = self._passed = len(prompt)
        return Shown(prompt, pieces)

    def absorb(self, events: Sequence[GenerateEvent], *, now: float) -> Shown:
        """Take events in that came together and return what they make safe to show.

        Tokens after the one that completed a stop string do not count: they were never asked for.
        """
        shown = Shown()
        tokens = [token for event in events for token in event.tokens]
        if tokens:
            self.record.came(now)
        if self._plain and not any(event.logprobs for event in events):
            self.record.tokens += len(tokens)
            shown.text = self._detokenizer.push_all(tokens)
        else:
            for event in events:
                self._take_tokens(shown, event)
                if self.finish:
                    break
        # What came after a stop string was computed all the same, and is on the bill.
        self.record.report(events[-1])
        finish = events[-1].finish
        if finish is not None and self.finish is None:
            self._show(shown, self._detokenizer.flush())
            if self.finish is None:
                self._pass(shown, self._stops.flush())
                self._end(shown, "length" if finish == "length" else "stop")
                shown.pieces += self._held
                return shown
        while self._held and self._held[0].offset < self._passed:
            shown.pieces.append(self._held.popleft())
        return shown

    def _take_tokens(self, shown: Shown, event: GenerateEvent) -> None:
        record = self.record
        record.report(event)
        for place, token in enumerate(event.tokens):
            record.tokens += 1
            if event.logprobs:
                scored = event.logprobs[place]
                self._logprob_sum += scored.logprob
                self._held.append(TokenPiece(token, scored, self._decoded))
            self._show(shown, self._detokenizer.push(token))
            if self.finish:
                return

    def _show(self, shown: Shown, piece: str) -> None:
        self._decoded += len(piece)
        step = self._stops.push(piece)
        self._pass(shown, step.text)
        if step.stopped:
            self._end(shown, "stop")

    def _pass(self, shown: Shown, text: str) -> None:
        self._passed += len(text)
        if self._parser is None:
            shown.text += text
            return
        said, calls = self._parser.push(text)
        shown.text += said
        shown.calls += calls
        self._called = self._called or bool(calls)

    def _end(self, shown: Shown, finish: FinishReason) -> None:
        if self._parser is not None:
            shown.text += self._parser.flush()
        self.finish = "tool_calls" if self._called and finish == "stop" else finish
