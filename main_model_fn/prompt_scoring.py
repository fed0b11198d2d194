"""Log-probabilities of prompt tokens, taken while the prompt is read.

Engines compute logits only where a token is to come: at a prompt's last row. The hidden states of
all rows pass by, though, and of those that are asked for the model's own head makes logits, a
bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from main_model_fn.logprobs import token_logprobs
from main_model_fn.stream import Stream

__all__ = ["PromptRows", "PromptScorer"]

_MAX_LOGITS = 1 << 23  # float32 numbers at a time: 32 MiB


class PromptRows(NamedTuple):
    """Rows of a step that are a stream's tokens from `position` on; `first` is the first row."""

    stream: Stream
    first: int
    position: int
    rows: int


class PromptScorer:
    """Fills the prompt log-probabilities of the streams in a step.

    `head` makes float32 logits [rows, vocab] of hidden states [rows, hidden].
    """

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor], *, vocab_size: int) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._wanted: list[PromptRows] = []

    def expect(self, wanted: list[PromptRows]) -> None:
        """Say which rows of the coming forward pass are to be scored."""
        self._wanted = wanted

    def score(self, hidden: torch.Tensor) -> None:
        """Take what is wanted from a step's hidden states [rows, hidden]."""
        rows_at_once = max(1, _MAX_LOGITS // self._vocab_size)
        for wanted in self._wanted:
            stream, prompt = wanted.stream, wanted.stream.request.prompt_tokens
            top = stream.request.prompt_logprobs or 0
            for position, row, count in _slices(wanted, len(prompt), rows_at_once):
                logits = self._head(hidden[row : row + count])
                after = slice(position + 1, position + 1 + count)  # a row tells of the next token
                stream.prompt_logprobs[after] = token_logprobs(logits, prompt[after], top)
        self._wanted = []


def _slices(
    wanted: PromptRows, prompt_tokens: int, rows_at_once: int
) -> Iterator[tuple[int, int, int]]:
    """(position, row, rows) of each part; the prompt's last row tells of no prompt token."""
    rows = min(wanted.rows, prompt_tokens - 1 - wanted.position)
    for start in range(0, rows, rows_at_once):
        count = min(rows_at_once, rows - start)
        yield wanted.position + start, wanted.first + start, count
