"""Prompts scored in a library's model: its body's hidden states, by a hook, and its own head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from main_model_fn.prompt_scoring import PromptScorer

__all__ = ["library_scorer"]


def library_scorer(model: PreTrainedModel) -> PromptScorer:
    """What scores the rows that pass the model's body."""

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = _head(model).forward(inputs_embeds=hidden[None]).logits[0].float()
        return logits

    scorer = PromptScorer(head, vocab_size=int(model.config.vocab_size))

    def after_body(_body: torch.nn.Module, _args: object, output: Any) -> None:
        scorer.score(output.last_hidden_state[0])

    model.base_model.register_forward_hook(after_body)
    return scorer


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
