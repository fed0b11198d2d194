"""Prompts to profile: a folder with a folder a set, each with its prompts and their topics."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from remoe.errors import CheckpointError

__all__ = ["LabelledPrompt", "read_prompts"]

# Rows at this place of every ten are kept out of a history, to measure predictions on.
HELD_OUT_EVERY, HELD_OUT_ROW = 10, 5


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """`label` is "set/topic"."""

    text: str
    label: str


def read_prompts(folder: Path, per_set: int, *, held_out: bool = False) -> list[LabelledPrompt]:
    """Return up to `per_set` prompts of each set, taking its topics in turn.

    A set's folder has a `prompts.jsonl` or `.jsonl.gz`: one object a line with `prompt` and
    `topic`. Raises CheckpointError if there is none.
    """
    chosen: list[LabelledPrompt] = []
    for set_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        plain, packed = set_folder / "prompts.jsonl", set_folder / "prompts.jsonl.gz"
        if not (plain.exists() or packed.exists()):
            continue
        by_topic: dict[str, list[str]] = {}
        with (
            plain.open(encoding="utf-8")
            if plain.exists()
            else gzip.open(packed, "rt", encoding="utf-8")
        ) as lines:
            for index, line in enumerate(lines):
                if (index % HELD_OUT_EVERY == HELD_OUT_ROW) == held_out:
                    record = json.loads(line)
                    by_topic.setdefault(str(record["topic"]), []).append(str(record["prompt"]))
        chosen += _in_turn(set_folder.name, by_topic, per_set)
    if not chosen:
        raise CheckpointError(
            f"{folder} holds no prompts; it must have a folder a set with a prompts.jsonl, "
            'one {"prompt": ..., "topic": ...} a line'
        )
    return chosen


def _in_turn(set_name: str, by_topic: dict[str, list[str]], count: int) -> list[LabelledPrompt]:
    """Take a prompt of each topic, then a second of each, and so on; topics by size, largest first."""
    topics = sorted(by_topic.items(), key=lambda item: (-len(item[1]), item[0]))
    taken: list[LabelledPrompt] = []
    round_number = 0
    while len(taken) < count and any(len(texts) > round_number for _, texts in topics):
        for topic, texts in topics:
            if len(texts) > round_number and len(taken) < count:
                # Spread over the topic's rows: neighbours are often variants of one question.
                step = max(1, len(texts) // max(1, count // len(topics) + 1))
                text = texts[(round_number * step) % len(texts)]
                taken.append(LabelledPrompt(text, f"{set_name}/{topic}"))
        round_number += 1
    return taken
