from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from loadgen.corpus import read_corpus
from loadgen.prompts import CalibratedCutter, PromptMaker, TokenizerCutter
from remoe.errors import SettingsError

CORPUS = read_corpus()


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 8000),
    per_token=st.floats(1, 8),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 2**32),
)
def test_prompts_have_the_length_that_was_calibrated(
    tokens: int, per_token: float, index: int, seed: int
) -> None:
    maker = PromptMaker(CORPUS, CalibratedCutter(per_token, overhead_tokens=0.0), seed=seed)
    prompt, topic = maker.make(index, tokens)
    assert topic in CORPUS.topics
    wanted = max(1, round(tokens * per_token))
    assert wanted - 3 <= len(prompt) <= wanted  # a cut may end in blanks, which are dropped
    assert (prompt, topic) == maker.make(index, tokens)


def test_prompts_differ_by_index_and_seed() -> None:
    maker = PromptMaker(CORPUS, CalibratedCutter(4.0), seed=1)
    prompts = {maker.make(index, 200)[0] for index in range(50)}
    assert len(prompts) > 40
    assert maker.make(3, 200) != PromptMaker(CORPUS, CalibratedCutter(4.0), seed=2).make(3, 200)


def test_a_wanted_topic_is_kept() -> None:
    maker = PromptMaker(CORPUS, CalibratedCutter(4.0), seed=1)
    prompt, topic = maker.make(0, 30, "law")
    assert topic == "law"
    assert any(prompt in text for text in CORPUS.topics["law"])


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 600), overhead=st.integers(0, 30))
def test_a_tokenizer_cuts_exactly(tokenizer: Tokenizer, tokens: int, overhead: int) -> None:
    maker = PromptMaker(CORPUS, TokenizerCutter(tokenizer, overhead), seed=1)
    prompt, _ = maker.make(7, tokens)
    found = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    assert abs(found - max(1, tokens - overhead)) <= 1  # the border may merge differently


def test_the_shipped_corpus_has_many_topics() -> None:
    assert len(CORPUS.topics) == 12
    assert all(len(texts) >= 3 for texts in CORPUS.topics.values())


def test_a_folder_of_prompt_sets_is_a_corpus(tmp_path: Path) -> None:
    for name, packed in (("law", False), ("code", True)):
        (tmp_path / name).mkdir()
        line = json.dumps({"id": "1", "prompt": f"about {name}", "topic": "t"}).encode() + b"\n"
        file = tmp_path / name / ("prompts.jsonl.gz" if packed else "prompts.jsonl")
        file.write_bytes(gzip.compress(line) if packed else line)
    corpus = read_corpus(tmp_path)
    assert corpus.topics == {"law/t": ("about law",), "code/t": ("about code",)}


def test_bad_corpora_and_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at any depth"):
        read_corpus(tmp_path)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(SettingsError, match=r"prompts.jsonl:2: "):
        read_corpus(file)
    file.write_text('{"prompt": " "}\n')
    with pytest.raises(SettingsError, match="has no text"):
        read_corpus(file)
    with pytest.raises(SettingsError, match="not a tokenizer"):
        TokenizerCutter.load(file)
    with pytest.raises(SettingsError, match="does not exist"):
        TokenizerCutter.load(tmp_path)
