"""Profiles which experts prompts use: while they are read, and while their answers are written.

The two are kept apart because they differ: a short prompt is mostly the chat template's own
tokens, and an answer is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from main_model_fn.batch_decoding import decode_batch
from main_model_fn.prompt_sets import LabelledPrompt
from main_model_fn.routing_recorder import RoutingRecorder
from remoe.checkpoint import Checkpoint

__all__ = [
    "PromptActivation",
    "batches_of",
    "encode_prompt",
    "encode_prompts",
    "profile_prompts",
    "prompt_vector",
    "write_history",
]

DECODE_TOKENS = 48
_BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}


class Tokenizer(Protocol):
    """The part of a transformers tokenizer used here."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> list[int]:
        """Return the tokens of a conversation."""


@dataclass(frozen=True, slots=True)
class PromptActivation:
    """What one prompt did. Without a decoded token, the decode profile is the prefill's."""

    vector: NDArray[np.float32]  # [hidden], of length 1
    profile: NDArray[np.float32]  # [layers, experts], rows sum to 1: prefill
    decode_profile: NDArray[np.float32]  # [layers, experts], rows sum to 1
    tokens: int
    decoded: int


def profile_prompts(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    decode_tokens: int = DECODE_TOKENS,
    batch_tokens: int = _BATCH_TOKENS["cpu"],
) -> list[PromptActivation]:
    """Return each prompt's activation, the prompt put as one user turn through the chat template.

    After its prefill a prompt decodes up to `decode_tokens` tokens. Prompts of like length share a
    batch of at most `batch_tokens`, padding and decoded tokens included; 1 runs them one by one.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    results: dict[int, PromptActivation] = {}
    recorder = RoutingRecorder(model)
    table = model.get_input_embeddings().weight
    with recorder.installed(), torch.no_grad():
        for chosen in batches_of(encoded, decode_tokens, batch_tokens):
            passes = decode_batch(model, [encoded[index] for index in chosen], decode_tokens)
            recorder.begin(next(passes))
            first_step = next(passes, None)  # the prefill runs before this returns
            prefill = recorder.profiles()
            decode, decoded = prefill, np.zeros(len(chosen), np.int64)
            if first_step is not None:
                recorder.begin(first_step)
                steps = [first_step]
                for step in passes:
                    recorder.expect(step)
                    steps.append(step)
                decoded = torch.cat(steps, dim=1).sum(1).cpu().numpy()
                decode = np.where(decoded[:, None, None] > 0, recorder.profiles(), prefill)
            for row, index in enumerate(chosen):
                results[index] = PromptActivation(
                    vector=prompt_vector(table, encoded[index]),
                    profile=prefill[row],
                    decode_profile=decode[row],
                    tokens=len(encoded[index]),
                    decoded=int(decoded[row]),
                )
    return [results[index] for index in range(len(prompts))]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens that a gateway would send for a prompt alone."""
    return list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    )


def encode_prompts(model_dir: Path, prompts: Sequence[LabelledPrompt]) -> Iterator[list[int]]:
    """Return each prompt's tokens, as `encode_prompt` does with the model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return (encode_prompt(tokenizer, prompt.text) for prompt in prompts)


def prompt_vector(table: Tensor, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the normalised sum of the tokens' normalised input embeddings: [hidden], of length 1.

    The cosine of two such vectors is Remoe's semantic similarity (eq. 11) without the token Gram matrix.
    """
    rows = table[torch.as_tensor(ids, device=table.device)].detach().float()  # [tokens, hidden]
    vector = F.normalize(F.normalize(rows, dim=-1).sum(0), dim=0)
    return np.asarray(vector.cpu().numpy(), dtype=np.float32)


def batches_of(
    encoded: Sequence[Sequence[int]], decode_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Prompts of like length together, at most `batch_tokens` with padding and what is decoded."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    batch: list[int] = []
    for index in order:
        width = len(encoded[index]) + decode_tokens
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def write_history(
    model_dir: Path,
    prompts: Sequence[LabelledPrompt],
    out: Path,
    *,
    max_tokens: int,
    decode_tokens: int = DECODE_TOKENS,
) -> tuple[int, int]:
    """Profile prompts of at most `max_tokens` and write arrays without text; returns how many
    prompts and topics."""
    digest = Checkpoint.open(model_dir).digest
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = model.to(device).eval()
    prompts = [
        prompt for prompt in prompts if len(encode_prompt(tokenizer, prompt.text)) <= max_tokens
    ]
    activations = profile_prompts(
        model,
        tokenizer,
        [prompt.text for prompt in prompts],
        decode_tokens=decode_tokens,
        batch_tokens=_BATCH_TOKENS[device.type],
    )
    topics = sorted({prompt.label for prompt in prompts})
    number = {label: index for index, label in enumerate(topics)}
    np.savez_compressed(
        out,
        vectors=np.stack([item.vector for item in activations]).astype(np.float16),
        profiles=np.stack([item.profile for item in activations]).astype(np.float16),
        decode_profiles=np.stack([item.decode_profile for item in activations]).astype(np.float16),
        n_tokens=np.array([item.tokens for item in activations], np.int32),
        topic=np.array([number[prompt.label] for prompt in prompts], np.int32),
        topics=np.array(topics),
        model_digest=np.array(digest),
    )
    return len(activations), len(topics)
