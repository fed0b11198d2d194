"""The model's tokens as bytes, and the check that a grammar can be followed with them."""

from __future__ import annotations

import asyncio
from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from remoe.errors import InvalidRequestError

__all__ = ["Vocabulary"]


class Vocabulary:
    """One tokenizer's tokens. Reading them takes a third of a second: only when first needed."""

    def __init__(self, tokenizer_path: Path, *, size: int) -> None:
        self._path = tokenizer_path
        self._size = size
        self._bytes: dict[int, bytes] = {}

    async def load(self) -> None:
        """Have the tokens at hand; later calls return at once."""
        if "_tokens" not in self.__dict__:
            await asyncio.to_thread(lambda: self._tokens)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; for a part of a character, its bytes."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._tokens.decode_bytes([token])
        return known

    def check(self, grammar: str, *, param: str) -> None:
        """Raise InvalidRequestError, in the library's words, if the grammar cannot be followed."""
        reason = LLMatcher.validate_grammar(grammar, self._tokens)
        if reason and not reason.startswith("WARNING"):
            raise InvalidRequestError(
                f"'{param}' cannot be followed: {reason[:500]}. Leave out or change what is named.",
                param=param,
            )

    @cached_property
    def _tokens(self) -> LLTokenizer:
        return LLTokenizer(self._path.read_text("utf-8"), n_vocab=self._size)
