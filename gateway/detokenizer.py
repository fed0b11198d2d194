"""Tokens to text as they come, without ever splitting a character."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer

__all__ = ["Detokenizer"]

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, hence at most four tokens.
_LONGEST_CHARACTER = 4
# Pending tokens that are not the start of any character: cut rather than decode ever more.
_PENDING_LIMIT = 32
_REMEMBERED_TOKENS = 16_384


@lru_cache(maxsize=_REMEMBERED_TOKENS)
def _text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text by itself: of each new token as the context of the next."""
    return tokenizer.decode([token], skip_special_tokens=True)


class Detokenizer:
    """Incremental decoding of one sequence; the pieces join to the decoding of the whole.

    Each step decodes the tokens of the last piece before the new ones, since decoders look at
    their neighbours (Metaspace strips the first space of a text), and holds back text that ends
    in U+FFFD, which is how a character reads whose bytes are not complete yet.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that this token completes, possibly none."""
        self._pending.append(token)
        text = self._new_text(self._pending)
        if text and not text.endswith(_REPLACEMENT):
            self._settle(len(self._pending))
            return text
        if len(self._pending) > _PENDING_LIMIT:
            return self._cut()
        return ""

    def push_all(self, tokens: list[int]) -> str:
        """Return the text that these tokens complete; the same as of one after the other."""
        if len(tokens) > 1:
            text = self._new_text([*self._pending, *tokens])
            if text and not text.endswith(_REPLACEMENT):
                self._pending += tokens
                self._settle(len(self._pending))
                self._shorten()
                return text
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        """Return what is held back at the end of the sequence."""
        text = self._new_text(self._pending)
        self._settle(len(self._pending))
        return text

    def _cut(self) -> str:
        """Give out a run of broken bytes, save those that may begin the next character."""
        whole = self._new_text(self._pending)
        for kept in range(1, _LONGEST_CHARACTER + 1):
            head, tail = self._pending[:-kept], self._pending[-kept:]
            text = self._new_text(head)
            if text + self._decode(tail) == whole:
                self._settle(len(head))
                return text
        return ""

    def _settle(self, count: int) -> None:
        self._context = self._pending[:count]
        self._pending = self._pending[count:]
        if count == 1:
            self._context_text = _text_of(self._tokenizer, self._context[0])
        else:
            self._context_text = self._decode(self._context)

    def _shorten(self) -> None:
        """Keep one token as context if it is whole characters: what follows needs no more."""
        last = self._context[-1]
        text = _text_of(self._tokenizer, last)
        if text and _REPLACEMENT not in text:
            self._context, self._context_text = [last], text

    def _new_text(self, tokens: list[int]) -> str:
        return self._decode([*self._context, *tokens])[len(self._context_text) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
