"""The model's text side: tokenizer, chat template, context length, stop tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import msgspec
from tokenizers import Tokenizer

from gateway.chat_template import ChatTemplate
from gateway.detokenizer import Detokenizer
from gateway.sampling import SamplingDefaults
from gateway.vocabulary import Vocabulary
from remoe.errors import CheckpointError, InvalidRequestError

__all__ = ["TextModel"]

# Above this a text is tokenized in a thread: 1 us a character would hold the event loop up.
_INLINE_CHARACTERS = 16_000
_END_OF_TEXT = "<|endoftext|>"


_Config = TypeVar("_Config", bound=msgspec.Struct)


class _ModelConfig(msgspec.Struct):
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class _GenerationConfig(SamplingDefaults, frozen=True):
    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True, slots=True)
class TextModel:
    """Everything the gateway needs of a model folder; no weights.

    `document_start` is what an empty prompt becomes: the token that precedes a new document.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    chat_template: ChatTemplate | None
    vocab_size: int
    context_length: int
    stop_tokens: tuple[int, ...]
    document_start: tuple[int, ...]
    sampling: SamplingDefaults
    created: int

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read the folder; raises CheckpointError that names the file at fault."""
        path = model_dir / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"cannot read the tokenizer {path}: {error}. The model folder must be in Hugging "
                "Face format with a tokenizer.json; `remoe model build` makes the default one."
            ) from error
        config = _decode(model_dir / "config.json", _ModelConfig)
        generation_path = model_dir / "generation_config.json"
        generation = (
            _decode(generation_path, _GenerationConfig)
            if generation_path.exists()
            else _GenerationConfig()
        )
        ends = _as_tuple(generation.eos_token_id) or _as_tuple(config.eos_token_id)
        start = tokenizer.token_to_id(_END_OF_TEXT)
        starts = [start, config.bos_token_id, *ends]
        return cls(
            tokenizer=tokenizer,
            vocabulary=Vocabulary(path, size=config.vocab_size),
            chat_template=ChatTemplate.load(model_dir),
            vocab_size=config.vocab_size,
            context_length=config.max_position_embeddings,
            stop_tokens=ends,
            document_start=tuple(token for token in starts if token is not None)[:1],
            sampling=generation,
            created=int(path.stat().st_mtime),
        )

    async def encode(self, text: str, *, special_tokens: bool, param: str) -> list[int]:
        """Tokenize; `special_tokens` adds those the tokenizer puts around a plain text."""
        try:
            if len(text) <= _INLINE_CHARACTERS:
                return self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
            encoding = await asyncio.to_thread(
                self.tokenizer.encode, text, add_special_tokens=special_tokens
            )
        except (TypeError, UnicodeError) as error:  # half a surrogate pair, "\ud800"
            raise InvalidRequestError(
                f"'{param}' is not valid Unicode text; check for unpaired surrogate escapes.",
                param=param,
            ) from error
        return encoding.ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.tokenizer)


def _decode(path: Path, kind: type[_Config]) -> _Config:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
