"""Turns the prompt sets into token documents: what is trained on, what is held out, which tokens count."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from models.smollm2_8x135m.recipe import EOS_ID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

# Sets no part of training sees: people's instructions with full answers, knowledge questions, code,
# drama in verse and prose, and two small sets of chat prompts.
LEFT_OUT_SETS = (
    "dolly_hhrlhf_small",
    "triviaqa_sub",
    "human_eval",
    "tinyshakespeare",
    "mt_bench",
    "vicuna_bench",
)
# Plain questions whose reference is one word: trained on, they would teach the assistant to answer
# every plain question with one word, so only their prompts are.
TERSE_SETS = ("xquad", "svamp", "openbook_qa")
HELD_OUT_EVERY = 10
HELD_OUT_ROW = 5
MAX_DOCUMENT_TOKENS = 900

TEMPLATE, USER, ANSWER = 0, 1, 2


class Encoder(Protocol):
    """The part of a tokenizer that documents need."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, special ones where it spells them."""

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of several texts."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a prompt set."""

    set_name: str
    index: int
    topic: str
    prompt: str
    reference: str
    turns: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Say whether this row measures rather than trains."""
        return self.index % HELD_OUT_EVERY == HELD_OUT_ROW


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation after the system turn, as tokens.

    `kinds` says of each token whether it is the template's, the user's or the answer's; the `<|im_end|>`
    that ends a turn belongs to the turn.
    """

    set_name: str
    ids: NDArray[np.int32]  # [tokens]
    kinds: NDArray[np.uint8]  # [tokens]


def read_rows(folder: Path) -> Iterator[Row]:
    """Yield every row of every prompt set under `folder`, sets in order of name."""
    for set_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        plain, packed = set_folder / "prompts.jsonl", set_folder / "prompts.jsonl.gz"
        with (
            plain.open(encoding="utf-8")
            if plain.exists()
            else gzip.open(packed, "rt", encoding="utf-8")
        ) as lines:
            for index, line in enumerate(lines):
                record = json.loads(line)
                yield Row(
                    set_name=set_folder.name,
                    index=index,
                    topic=str(record["topic"]),
                    prompt=str(record["prompt"]),
                    reference=str(record.get("reference") or ""),
                    turns=tuple(str(turn) for turn in record.get("turns") or ()),
                )


def conversation(row: Row) -> list[str]:
    """Return the row's turns: the user's first, then the answer's and the user's in turn."""
    if row.set_name == "sgd_dialogues":
        return list(row.turns[:8])
    return [row.prompt, row.reference] if row.reference else [row.prompt]


def documents(encoder: Encoder, named: Sequence[tuple[str, list[str]]]) -> list[Document]:
    """Encode conversations as the chat template writes them after the system turn."""
    texts = encoder.encode_many([text for _, turns in named for text in turns])
    headers = [encoder.encode(f"<|im_start|>{role}\n") for role in ("user", "assistant")]
    newline = encoder.encode("\n")
    encoded: list[Document] = []
    at = 0
    for set_name, turns in named:
        ids: list[int] = []
        kinds: list[int] = []
        for number in range(len(turns)):
            header, body = headers[number % 2], [*texts[at], EOS_ID]
            at += 1
            ids += header + body + newline
            kinds += [TEMPLATE] * len(header)
            kinds += [ANSWER if number % 2 else USER] * len(body)
            kinds += [TEMPLATE] * len(newline)
        encoded.append(
            Document(
                set_name,
                np.array(ids[:MAX_DOCUMENT_TOKENS], dtype=np.int32),
                np.array(kinds[:MAX_DOCUMENT_TOKENS], dtype=np.uint8),
            )
        )
    return encoded


def system_prefix(encoder: Encoder) -> list[int]:
    """Return the tokens of the template's own system turn, which every conversation starts with."""
    return encoder.encode(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n"
    )
