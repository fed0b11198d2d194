"""One choice: tokens in, text out, ended by the model, by its limit, or by a stop string."""

from __future__ import annotations

from typing import Literal

from gateway.detokenizer import Detokenizer
from gateway.receipt import ChoiceRecord
from gateway.stop import StopMatcher
from remoe.generation import GenerateEvent

__all__ = ["Choice"]


class Choice:
    """The state of one generation as the client sees it."""

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self.record = ChoiceRecord()
        self.finish: Literal["stop", "length"] | None = None
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)

    def absorb(self, event: GenerateEvent, *, now: float) -> str:
        """Take an event in and return the text it makes safe to show.

        Tokens after the one that completed a stop string do not count: they were never asked for.
        """
        record = self.record
        record.stats = event.stats or record.stats
        if event.tokens:
            record.came(now)
        shown = []
        for token in event.tokens:
            record.tokens += 1
            shown.append(self._show(self._detokenizer.push(token)))
            if self.finish:
                return "".join(shown)
        if event.finish is not None:
            shown.append(self._show(self._detokenizer.flush()))
            if self.finish is None:
                shown.append(self._stops.flush())
                self.finish = "length" if event.finish == "length" else "stop"
        return "".join(shown)

    def _show(self, piece: str) -> str:
        step = self._stops.push(piece)
        if step.stopped:
            self.finish = "stop"
        return step.text
