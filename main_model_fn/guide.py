"""Answers kept within a grammar: before a token is drawn, those that would leave it are ruled out.

llguidance follows the grammar and says which tokens may come; it needs 10 us to 1 ms a token and no
tensor library. Log-probabilities are not touched: they are the model's own.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from remoe.errors import InvalidRequestError

__all__ = ["Guide", "Guides"]


class Guide:
    """Follows one answer; used from the engine's thread."""

    def __init__(self, matcher: LLMatcher, *, end_token: int) -> None:
        self._matcher = matcher
        self._end_token = end_token

    def restrict(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores [vocab] with minus infinity for tokens that may not come."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(scores), bitorder="little").view(bool)
        if self._matcher.is_error():
            # The answer has failed; this ends it in the engine too.
            allowed = np.arange(len(scores)) == self._end_token
        return np.where(allowed, scores, -np.inf).astype(np.float32, copy=False)

    def accept(self, token: int) -> bool:
        """Go on by a token; False if the grammar turned out too large to be followed."""
        return self._matcher.consume_token(token)


class Guides:
    """Makes guides for one model's tokens."""

    def __init__(self, tokenizer_path: Path, *, vocab_size: int) -> None:
        self._path = tokenizer_path
        self._vocab_size = vocab_size
        # A third of a second each; requests to one model have the same stop tokens.
        self._tokens = lru_cache(4)(self._read)

    def guide(self, grammar: str, stop_tokens: tuple[int, ...]) -> Guide:
        """Begin an answer that ends with one of `stop_tokens`, at the earliest where it may.

        Takes up to a second; raises InvalidRequestError if the grammar is not one.
        """
        if not stop_tokens:
            raise InvalidRequestError("a grammar needs stop tokens to end the answer with")
        matcher = LLMatcher(self._tokens(stop_tokens), grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(f"not a grammar: {matcher.get_error()[:500]}")
        return Guide(matcher, end_token=stop_tokens[0])

    def _read(self, stop_tokens: tuple[int, ...]) -> LLTokenizer:
        try:
            text = self._path.read_text("utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(stop_tokens))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"answers cannot be kept within a grammar: {self._path} cannot be used: {error}"
            ) from error
