from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.embedding import TokenTableEmbedder
from planner.prompt_index import PromptIndex, embedded_anew
from tests.planner.test_embedding import ArrayTable
from tests.planner.test_history import entries

CHANCE = np.random.default_rng(0)
OLD = TokenTableEmbedder(ArrayTable(CHANCE.standard_normal((30, 16)).astype(np.float32)))
NEW = TokenTableEmbedder(ArrayTable(CHANCE.standard_normal((30, 5)).astype(np.float32)))
PROMPTS = [[1, 2, 3], [1, 2, 4], [1, 2], [9, 8, 7, 6]]


def test_prompts_are_recognised_by_their_rounded_vectors() -> None:
    index = PromptIndex(PROMPTS, OLD)
    blank = next(entries(1))
    made = [
        replace(blank, vector=OLD.embed(prompt).astype(np.float16), n_tokens=len(prompt))
        for prompt in [*PROMPTS[::-1], [5, 5, 5]]
    ]
    assert [index.find(entry) for entry in made] == [*PROMPTS[::-1], None]
    assert index.find(replace(made[0], n_tokens=3)) is None
    anew = list(embedded_anew(made, index, NEW))
    assert len(anew) == 4
    for entry, prompt in zip(anew, PROMPTS[::-1], strict=True):
        np.testing.assert_array_equal(entry.vector, NEW.embed(prompt))


def test_no_prompts_recognise_nothing() -> None:
    assert PromptIndex([], OLD).find(next(entries(1))) is None
