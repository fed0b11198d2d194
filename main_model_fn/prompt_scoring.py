"""Log-probabilities of prompt tokens, taken while the prompt is read.

Engines compute logits only where a token is to come: at a prompt's last row. The hidden states of
all rows pass by, though. A forward hook on the model's body takes those that are asked for, and
the model's own head makes logits of them, a bounded number at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

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
    """Fills the prompt log-probabilities of the streams in a step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._vocab_size = int(model.config.vocab_size)
        self._wanted: list[PromptRows] = []
        model.base_model.register_forward_hook(self._after_body)

    def expect(self, wanted: list[PromptRows]) -> None:
        """Say which rows of the coming forward pass are to be scored."""
        self._wanted = wanted

    def _after_body(self, _body: torch.nn.Module, _args: object, output: Any) -> None:
        if not self._wanted:
            return
        hidden = output.last_hidden_state[0]  # [rows, hidden]
        head = _head(self._model)
        rows_at_once = max(1, _MAX_LOGITS // self._vocab_size)
        for wanted in self._wanted:
            stream, prompt = wanted.stream, wanted.stream.request.prompt_tokens
            top = stream.request.prompt_logprobs or 0
            for position, row, count in _slices(wanted, len(prompt), rows_at_once):
                logits = (
                    head.forward(inputs_embeds=hidden[None, row : row + count]).logits[0].float()
                )
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


class _Given(torch.nn.Module):
    """In place of a model's body: what it is given is what the body would have computed."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head(model: PreTrainedModel) -> PreTrainedModel:
    """The model from its last hidden states on, with what a family does to logits.

    Its tensors are the model's, and so are its hooks, which are for whole passes: `forward` goes
    by without them.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}  # noqa: SLF001
    return head
