"""Measures a built checkpoint against its dense base: held-out loss, replies, sample chats.

python -m models.smollm2_8x135m.evaluate --model DIR --prompts DIR --out figures.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.build import find_gguf
from models.smollm2_8x135m.corpus import (
    ANSWER,
    LEFT_OUT_SETS,
    USER,
    Document,
    Row,
    conversation,
    documents,
    read_rows,
    system_prefix,
)
from models.smollm2_8x135m.distill import dense_model
from models.smollm2_8x135m.gguf_base import BaseTokenizer, GgufBase
from models.smollm2_8x135m.sample_chats import CHATS, REPLY_PROMPT_SETS

_BATCH_TOKENS = 16_384


@dataclass(slots=True)
class Sums:
    """Loss summed over tokens, in nats."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float | None:
        """Nats a token, where there are any."""
        return round(self.nats / self.tokens, 4) if self.tokens else None

    def add(self, other: Sums) -> None:
        """Add another sum to this one."""
        self.nats += other.nats
        self.tokens += other.tokens


def main() -> None:
    """Write every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of prompt sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--gguf", type=Path, help="the dense base (default: the installed package's)"
    )
    parser.add_argument("--per-set", type=int, default=200, help="rows of each set")
    parser.add_argument(
        "--replies", type=int, default=128, help="prompts answered for their length"
    )
    parser.add_argument("--no-chats", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base_file = GgufBase(arguments.gguf or find_gguf(), recipe.ARCHITECTURE)
    encoder = BaseTokenizer(base_file)
    rows = [
        row for row in read_rows(arguments.prompts) if row.set_name in LEFT_OUT_SETS or row.held_out
    ]
    chosen = _spread(rows, arguments.per_set)
    named = documents(encoder, [(row.set_name, conversation(row)) for row in chosen])
    prefix = system_prefix(encoder)

    models = {
        "base": dense_model(base_file, recipe.ARCHITECTURE, dtype).to(device),
        "ours": AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        .to(device)
        .eval(),
    }
    figures: dict[str, object] = {
        "model": json.loads((arguments.model / "remoe.json").read_text())["digest"]
    }
    figures["loss"] = _table({name: losses(m, named, prefix) for name, m in models.items()})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    asked = [
        row.prompt for row in rows if row.set_name in REPLY_PROMPT_SETS and len(row.prompt) < 600
    ]
    asked = asked[:: max(1, len(asked) // max(1, arguments.replies))][: arguments.replies]
    if asked:
        turns = [[{"role": "user", "content": text}] for text in asked]
        figures["replies"] = {
            name: _reply_figures(replies(m, tokenizer, turns, 300)) for name, m in models.items()
        }
    if not arguments.no_chats:
        figures["chats"] = {name: chats(m, tokenizer) for name, m in models.items()}
    arguments.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    print(json.dumps({k: v for k, v in figures.items() if k != "chats"}, indent=1))


def _spread(rows: Sequence[Row], per_set: int) -> list[Row]:
    """Return up to `per_set` rows of each set, evenly over the set."""
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        by_set.setdefault(row.set_name, []).append(row)
    return [
        members[int(i)]
        for members in by_set.values()
        for i in np.linspace(0, len(members) - 1, min(per_set, len(members))).astype(int)
    ]


@torch.no_grad()
def losses(
    model: PreTrainedModel, named: Sequence[Document], prefix: Sequence[int]
) -> dict[tuple[str, int], Sums]:
    """Return the loss on the user's and on the answer's tokens of every set.

    Each document stands alone behind the system turn. A turn's `<|im_end|>` counts; the template's own
    tokens don't.
    """
    totals: dict[tuple[str, int], Sums] = {}
    for batch in _batches(named, len(prefix)):
        width = max(len(item.ids) for item in batch) + len(prefix)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        kinds = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            end = len(prefix) + len(item.ids)
            ids[row, :end] = torch.tensor([*prefix, *item.ids.tolist()])
            kinds[row, len(prefix) : end] = torch.from_numpy(item.kinds.astype(np.int64))
            mask[row, :end] = 1
        nats = _token_nats(model, ids.to(model.device), mask.to(model.device)).cpu()
        for row, item in enumerate(batch):
            for kind in (USER, ANSWER):
                here = kinds[row, 1:] == kind
                if here.any():
                    sums = totals.setdefault((item.set_name, kind), Sums())
                    sums.add(Sums(float(nats[row][here].double().sum()), int(here.sum())))
    return totals


def _token_nats(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of predicting every token but the first: [rows, length - 1]."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = [
        F.cross_entropy(model.lm_head(h).float(), t, reduction="none")
        for h, t in zip(torch.split(hidden, 4096), torch.split(targets, 4096), strict=True)
    ]
    return torch.cat(parts).view(len(ids), -1)


def _batches(named: Sequence[Document], extra: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for item in sorted(named, key=lambda item: len(item.ids)):
        if batch and (len(batch) + 1) * (len(item.ids) + extra) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _table(measured: dict[str, dict[tuple[str, int], Sums]]) -> dict[str, object]:
    sets = sorted({name for name, _ in measured["base"]})
    table: dict[str, object] = {name: _line(measured, [name]) for name in sets}
    table["ALL TRAINED"] = _line(measured, [name for name in sets if name not in LEFT_OUT_SETS])
    table["ALL LEFT OUT"] = _line(measured, [name for name in sets if name in LEFT_OUT_SETS])
    return table


def _line(
    measured: dict[str, dict[tuple[str, int], Sums]], sets: Sequence[str]
) -> dict[str, float | int | None]:
    line: dict[str, float | int | None] = {}
    for label, kinds in (("all", (USER, ANSWER)), ("prompt", (USER,)), ("answer", (ANSWER,))):
        for model, losses_by in measured.items():
            total = Sums()
            for key in ((name, kind) for name in sets for kind in kinds):
                total.add(losses_by.get(key, Sums()))
            line[f"{label}_{model}"] = total.mean
            line[f"{label}_tokens"] = total.tokens
    return line


@torch.no_grad()
def replies(
    model: PreTrainedModel,
    tokenizer: object,
    conversations: Sequence[list[dict[str, str]]],
    max_tokens: int,
    temperature: float = 0.0,
) -> list[tuple[list[int], bool]]:
    """Return each conversation's next turn as tokens, and whether it ended by itself."""
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)  # type: ignore[attr-defined]
        for turns in conversations
    ]
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), recipe.EOS_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 0.9}
        if temperature
        else {"do_sample": False}
    )
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_tokens,
        eos_token_id=recipe.EOS_ID,
        pad_token_id=recipe.EOS_ID,
        **sampling,
    )[:, width:].tolist()
    cut = [
        tokens[: tokens.index(recipe.EOS_ID)] if recipe.EOS_ID in tokens else tokens
        for tokens in out
    ]
    return [(tokens, recipe.EOS_ID in full) for tokens, full in zip(cut, out, strict=True)]


def _reply_figures(given: list[tuple[list[int], bool]]) -> dict[str, float]:
    lengths = [len(tokens) for tokens, _ in given]
    return {
        "prompts": len(given),
        "ended_share": round(float(np.mean([ended for _, ended in given])), 3),
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "median_tokens": float(np.median(lengths)),
        "under_8_tokens_share": round(float(np.mean([length < 8 for length in lengths])), 3),
    }


def chats(model: PreTrainedModel, tokenizer: object) -> list[dict[str, object]]:
    """Hold the sample chats."""
    held: list[dict[str, object]] = []
    for chat in CHATS:
        torch.manual_seed(0)
        turns: list[dict[str, str]] = []
        ended = []
        for text in chat.user_turns:
            turns.append({"role": "user", "content": text})
            [(tokens, stopped)] = replies(
                model, tokenizer, [turns], chat.max_tokens, chat.temperature
            )
            turns.append({"role": "assistant", "content": tokenizer.decode(tokens)})  # type: ignore[attr-defined]
            ended.append(stopped)
        held.append({"temperature": chat.temperature, "turns": turns, "ended": ended})
    return held


if __name__ == "__main__":
    main()
