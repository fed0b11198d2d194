"""Stop strings: found across any chunk border, and never shown, not even in part."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StopMatcher", "StopStep"]


@dataclass(frozen=True, slots=True)
class StopStep:
    """Text that is safe to show, and whether a stop string has ended the text."""

    text: str
    stopped: bool


class StopMatcher:
    """Follow one text; the first stop string to be complete ends it, where that string began.

    Of several that are complete at the same character the longest counts. The result does not
    depend on how the text is cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> StopStep:
        """Add a piece; what might be the beginning of a stop string stays held."""
        text = self._held + piece
        end = self._first(text)
        if end is not None:
            self._held = ""
            return StopStep(text[:end], stopped=True)
        held = self._possible_start(text)
        self._held = text[len(text) - held :]
        return StopStep(text[: len(text) - held], stopped=False)

    def flush(self) -> str:
        """Return what was held at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> int | None:
        found = [
            (start + len(stop), start)
            for stop in self._stops
            for start in [text.find(stop)]
            if start >= 0
        ]
        return min(found)[1] if found else None

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        for length in range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
