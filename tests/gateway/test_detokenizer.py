"""Pieces of text join to the whole, whatever the tokens and wherever characters are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from gateway.detokenizer import Detokenizer


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=300)
@given(tokens=st.lists(st.integers(0, 399), max_size=120))
def test_any_tokens_decode_as_if_at_once(tokenizer: Tokenizer, tokens: list[int]) -> None:
    # Most random tokens are lone bytes, which are no characters: the whole has many U+FFFD.
    tokens = [token for token in tokens if token < tokenizer.get_vocab_size()]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab né漢🤖.", max_size=30),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=10),
    broken=st.lists(st.integers(100, 250), max_size=3),
)
def test_tokens_that_come_together_read_the_same(
    tokenizer: Tokenizer, text: str, sizes: list[int], broken: list[int]
) -> None:
    tokens = [*tokenizer.encode(text, add_special_tokens=False).ids, *broken]
    detokenizer = Detokenizer(tokenizer)
    shown = list[str]()
    start = 0
    while start < len(tokens):
        size = sizes[len(shown) % len(sizes)]
        shown.append(detokenizer.push_all(tokens[start : start + size]))
        start += size
    assert "".join([*shown, detokenizer.flush()]) == tokenizer.decode(tokens)


def test_a_character_of_four_tokens_comes_in_one_piece(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🤖b", add_special_tokens=False).ids
    assert len(tokens) == 6
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "🤖", "b", ""]


def test_an_unfinished_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🤖", add_special_tokens=False).ids[:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "\ufffd"]


def test_endless_broken_bytes_do_not_pile_up(tokenizer: Tokenizer) -> None:
    start = tokenizer.encode("🤖", add_special_tokens=False).ids[0]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(start) for _ in range(1000))
    assert len(shown) > 900
    assert set(shown) == {"\ufffd"}


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    end = 2
    assert tokenizer.id_to_token(end) == "<|im_end|>"
    tokens = tokenizer.encode("a b", add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, [end, *tokens, end])) == "a b"


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """A decoder that looks at its neighbours: it strips the first space of a text."""
    words = ["<s>", "▁hello", "▁world", "!", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<s>"))
    tokenizer.add_special_tokens([AddedToken("<s>")])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 4), max_size=12))
def test_spaces_between_words_survive(metaspace: Tokenizer, tokens: list[int]) -> None:
    assert "".join(pieces(metaspace, tokens)) == metaspace.decode(tokens)


def test_metaspaces_survive_tokens_that_come_together(metaspace: Tokenizer) -> None:
    tokens = [1, 2, 3, 4, 1, 0, 2, 2]
    assert metaspace.decode(tokens) == "hello world!  hello world world"
    for size in range(1, 4):
        detokenizer = Detokenizer(metaspace)
        cut = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        shown = "".join(map(detokenizer.push_all, cut)) + detokenizer.flush()
        assert shown == metaspace.decode(tokens)
