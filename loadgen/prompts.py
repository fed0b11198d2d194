"""Prompts of a wanted number of tokens, cut from text of one topic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from loadgen.corpus import Corpus
from remoe.errors import SettingsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CalibratedCutter", "Cutter", "PromptMaker", "TokenizerCutter"]

_BETWEEN = "\n\n"
_WORD_END = re.compile(r"\s+")


class Cutter(Protocol):
    """Knows how much text a number of tokens is."""

    def characters_for(self, tokens: int) -> int:
        """Enough characters for that many tokens, to gather text before `cut`."""
        ...

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of the text that makes a prompt of so many tokens, never empty."""
        ...


@dataclass(frozen=True, slots=True)
class CalibratedCutter:
    """Characters for each token as the server itself counted them, less the chat template's tokens.

    Needs no tokenizer, so that it works with any server; single prompts are off by some percent,
    which the report shows.
    """

    characters_per_token: float
    overhead_tokens: float = 0.0

    def characters_for(self, tokens: int) -> int:
        return max(1, round((tokens - self.overhead_tokens) * self.characters_per_token))

    def cut(self, text: str, tokens: int) -> str:
        return text[: self.characters_for(tokens)].rstrip() or text[:1]


@dataclass(frozen=True, slots=True)
class TokenizerCutter:
    """Cuts by the model's own `tokenizer.json`, exactly but for what a border may merge."""

    tokenizer: Tokenizer
    overhead_tokens: float = 0.0

    @classmethod
    def load(cls, path: Path, overhead_tokens: float = 0.0) -> TokenizerCutter:
        """Read a tokenizer.json or a folder with one; raises SettingsError."""
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise SettingsError(
                "--tokenizer needs the package tokenizers: pip install tokenizers"
            ) from error
        if not file.is_file():
            raise SettingsError(f"{file} does not exist; --tokenizer takes a tokenizer.json")
        try:
            return cls(Tokenizer.from_file(str(file)), overhead_tokens)
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise SettingsError(f"{file} is not a tokenizer: {error}") from error

    def characters_for(self, tokens: int) -> int:
        return 7 * tokens  # more than natural text has

    def cut(self, text: str, tokens: int) -> str:
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        wanted = max(1, round(tokens - self.overhead_tokens))
        return text[: offsets[min(wanted, len(offsets)) - 1][1]] or text[:1]


class PromptMaker:
    """Makes the prompt of request `index`; the same for the same seed, whatever came before."""

    def __init__(self, corpus: Corpus, cutter: Cutter, *, seed: int) -> None:
        self._topics = sorted(corpus.topics)
        self._corpus = corpus
        self._cutter = cutter
        self._seed = seed

    def make(self, index: int, tokens: int, topic: str | None = None) -> tuple[str, str]:
        """Return (prompt, topic): a topic's passages in a random order, from a random word on.

        Prompts that begin alike would be answered from a server's prefix cache.


        Text longer than all of a topic's passages begins again with them.
        """
        random = np.random.default_rng([self._seed, index])
        if topic not in self._corpus.topics:
            topic = self._topics[int(random.integers(len(self._topics)))]
        passages = self._corpus.topics[topic]
        order = random.permutation(len(passages))
        wanted = self._cutter.characters_for(tokens)
        parts = [_from_some_word(passages[order[0]], random)]
        length = len(parts[0])
        following = islice(cycle(order), 1, None)
        while length < wanted:
            parts.append(passages[next(following)])
            length += len(parts[-1]) + len(_BETWEEN)
        return self._cutter.cut(_BETWEEN.join(parts), tokens), topic


def _from_some_word(text: str, random: np.random.Generator) -> str:
    starts = [0, *(found.end() for found in _WORD_END.finditer(text))]
    return text[starts[int(random.integers(len(starts)))] :]
