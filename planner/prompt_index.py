"""Finds the prompts that history entries were made of, among prompts at hand.

A history keeps no text. Whoever has the prompts can recognise them by length and vector, and make
the history over for another embedder without running the model again.

See papers.md A.7.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from planner.embedding import Embedder
from planner.history_store import Entry

__all__ = ["PromptIndex", "embedded_anew"]

_SAME = 1e-4  # of cosine; files hold vectors in float16


class PromptIndex:
    """Prompts by the vectors of one embedder."""

    def __init__(self, prompts: Iterable[list[int]], embedder: Embedder) -> None:
        self.prompts = list(prompts)
        self._lengths = np.array([len(prompt) for prompt in self.prompts], np.int64)
        vectors = [embedder.embed(prompt) for prompt in self.prompts]
        self.vectors = np.array(vectors, np.float32).reshape(len(vectors), embedder.dimension)

    def find(self, entry: Entry) -> list[int] | None:
        """The tokens an entry was made of; None if they are not here."""
        rows = np.flatnonzero(self._lengths == entry.n_tokens)
        if len(rows) == 0:
            return None
        similarity = self.vectors[rows] @ entry.vector
        best = int(similarity.argmax())
        return self.prompts[rows[best]] if similarity[best] > 1 - _SAME else None


def embedded_anew(
    entries: Iterable[Entry], index: PromptIndex, embedder: Embedder
) -> Iterator[Entry]:
    """Give entries another embedder's vectors; those whose prompts are not here are left out."""
    for entry in entries:
        prompt = index.find(entry)
        if prompt is not None:
            yield replace(entry, vector=embedder.embed(prompt))
