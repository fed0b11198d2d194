"""Collects the dense base's own answers: chats of one and two turns, and plain text.

Training holds the upcycled model to the base's distribution on these tokens, so that it learns the prompt
sets and stays the assistant that the base is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.smollm2_8x135m.chats import FOLLOW_UPS, written_prompts
from models.smollm2_8x135m.corpus import LEFT_OUT_SETS, Encoder, Row, system_prefix
from models.smollm2_8x135m.packing import Piece
from models.smollm2_8x135m.recipe import EOS_ID, Architecture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import LlamaForCausalLM

    from models.smollm2_8x135m.gguf_base import GgufBase

# Sets whose prompts a person might really type to an assistant, and how many of each to answer.
_CHAT_SHARES = {
    "arena_hard_v01": 320,
    "awesome_chatgpt_prompts": 150,
    "self_instruct_seeds": 140,
    "user_oriented_instructions": 200,
    "clinc150": 400,
    "medquad": 150,
    "gsm8k": 150,
    "mbpp": 120,
    "nl2bash": 200,
    "svamp": 80,
    "openbook_qa": 80,
    "xquad": 160,
    "arc_easy": 60,
    "sgd_dialogues": 80,
}
_MAX_PROMPT_TOKENS = 256
_PLAIN_PREFIX_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to sample."""

    written: int = 1100
    plain: int = 1024
    answer_tokens: int = 220
    second_tokens: int = 160
    plain_tokens: int = 220
    user_turns: int = 1536
    user_turn_tokens: int = 96
    batch: int = 2048
    share: float = 1.0  # of each set's count in `_CHAT_SHARES`


def dense_model(base: GgufBase, arch: Architecture, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return the dense base as transformers' own model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        intermediate_size=arch.intermediate,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_positions,
        rms_norm_eps=arch.rms_eps,
        rope_parameters={"rope_theta": arch.rope_theta, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    state = {
        name: torch.from_numpy(base.weight(name.removesuffix(".weight")))
        for name in model.state_dict()
        if name != "lm_head.weight"
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.to(dtype).eval()


def collect(  # noqa: PLR0917
    model: LlamaForCausalLM,
    encoder: Encoder,
    rows: Sequence[Row],
    sizes: Sizes,
    seed: int,
    temperature: float,
) -> list[Piece]:
    """Sample the base; the documents' weights mark what it wrote and what was written for it."""
    torch.manual_seed(seed)
    chooser = random.Random(seed)
    prefix = system_prefix(encoder)

    def user(text: str) -> list[int]:
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return encoder.encode(turn)

    def sample(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        return _sample(model, prompts, max_tokens, sizes.batch, temperature)

    written = {tuple(user(text)) for text in written_prompts(sizes.written, seed)}
    asked = [list(ids) for ids in sorted(written)]
    asked += [user(text) for text in _set_prompts(rows, sizes, chooser)]
    asked = [ids for ids in asked if len(ids) <= _MAX_PROMPT_TOKENS]
    first = sample([prefix + ids for ids in asked], sizes.answer_tokens)
    newline = encoder.encode("\n")
    pieces: list[Piece] = []
    openings: list[tuple[list[int], list[float]]] = []
    for ids, answer in zip(asked, first, strict=True):
        # Prompts of the sets are to be learnt, not held; those written for the model are held.
        mark = float(tuple(ids) in written)
        tokens, weights = ids + answer, [mark] * len(ids) + [1.0] * len(answer)
        if answer[-1] == EOS_ID:
            follow_up = newline + user(chooser.choice(FOLLOW_UPS))
            openings.append((tokens + follow_up, weights + [1.0] * len(follow_up)))
        else:
            pieces.append(_piece(tokens, weights))
    second = sample([prefix + ids for ids, _ in openings], sizes.second_tokens)
    for (ids, marks), answer in zip(openings, second, strict=True):
        pieces.append(_piece(ids + answer, marks + [1.0] * len(answer)))

    starts = [
        encoder.encode(row.prompt[:200])[:_PLAIN_PREFIX_TOKENS]
        for row in _train_rows(rows, chooser, sizes.plain)
    ]
    starts = [ids for ids in starts if len(ids) == _PLAIN_PREFIX_TOKENS]
    for ids, text in zip(starts, sample(starts, sizes.plain_tokens), strict=True):
        pieces.append(_piece(ids + text, [1.0] * (len(ids) + len(text)), after_prefix=False))
    return pieces


def collect_user_turns(
    model: LlamaForCausalLM, encoder: Encoder, sizes: Sizes, seed: int
) -> list[Piece]:
    """Sample what the base expects users to say: it holds the model on prompts unlike any set's."""
    torch.manual_seed(seed)
    header = encoder.encode("<|im_start|>user\n")
    opening = system_prefix(encoder) + header
    turns = _sample(
        model, [opening] * sizes.user_turns, sizes.user_turn_tokens, sizes.batch, temperature=0.9
    )
    return [_piece(header + turn, [0.0] * len(header) + [1.0] * len(turn)) for turn in turns]


def save_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Keep collected documents, so that another run need not sample again."""
    np.savez_compressed(
        path,
        ids=np.concatenate([piece.ids for piece in pieces]).astype(np.uint16),
        weights=np.concatenate([piece.weights for piece in pieces]).astype(np.uint8),
        lengths=np.array([len(piece.ids) for piece in pieces], np.int32),
        after_prefix=np.array([piece.after_prefix for piece in pieces]),
    )


def load_pieces(path: Path) -> list[Piece]:
    """Return what `save_pieces` kept."""
    with np.load(path, allow_pickle=False) as kept:
        ends = np.cumsum(kept["lengths"])[:-1]
        return [
            Piece(ids.astype(np.int32), weights.astype(np.float32), bool(after_prefix))
            for ids, weights, after_prefix in zip(
                np.split(kept["ids"], ends),
                np.split(kept["weights"], ends),
                kept["after_prefix"],
                strict=True,
            )
        ]


def _train_rows(rows: Sequence[Row], chooser: random.Random, count: int) -> list[Row]:
    usable = [row for row in rows if not row.held_out and row.set_name not in LEFT_OUT_SETS]
    by_set: dict[str, list[Row]] = {}
    for row in usable:
        by_set.setdefault(row.set_name, []).append(row)
    each = -(-count // len(by_set))
    chosen = [
        row
        for members in by_set.values()
        for row in chooser.sample(members, min(each, len(members)))
    ]
    return chosen[:count]


def _set_prompts(rows: Sequence[Row], sizes: Sizes, chooser: random.Random) -> list[str]:
    prompts: list[str] = []
    for name, count in _CHAT_SHARES.items():
        usable = [
            row.prompt
            for row in rows
            if row.set_name == name and not row.held_out and (name != "xquad" or row.topic == "en")
        ]
        wanted = min(len(usable), max(1, round(count * sizes.share)))
        prompts += chooser.sample(usable, wanted) if usable else []
    return prompts


def _piece(ids: list[int], weights: list[float], *, after_prefix: bool = True) -> Piece:
    return Piece(np.array(ids, np.int32), np.array(weights, np.float32), after_prefix)


@torch.no_grad()
def _sample(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    max_tokens: int,
    batch: int,
    temperature: float,
) -> list[list[int]]:
    """Return a sampled continuation of each prompt, up to and including the end of the turn."""
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), EOS_ID)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=50,  # cheaper than a nucleus: no sort of the vocabulary
        )[:, width:].tolist()
        for index, tokens in zip(chosen, out, strict=True):
            end = tokens.index(EOS_ID) + 1 if EOS_ID in tokens else len(tokens)
            answers[index] = tokens[:end]
    return answers
