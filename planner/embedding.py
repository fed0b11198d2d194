"""One vector per prompt, whose cosine is the paper's soft cosine similarity (A.7.1).

With X̂ the L2-normalised token embeddings of two prompts, equation (11) is the cosine of the two
sums of X̂ rows. So a prompt is stored as that sum, normalised, and similarity is a dot product.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOKEN_TABLE", "Embedder", "EmbeddingTable", "TokenTableEmbedder"]

TOKEN_TABLE = "token-table"  # noqa: S105  # a name


class Embedder(Protocol):
    """Turns a prompt's token ids into a unit vector (zero if the prompt says nothing)."""

    @property
    def name(self) -> str:
        """Vectors of embedders of different names cannot be compared."""
        ...

    @property
    def dimension(self) -> int: ...

    def embed(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Return float32 [dimension]; ids must lie inside the vocabulary."""
        ...


class EmbeddingTable(Protocol):
    """What `remoe.checkpoint.Checkpoint` gives of a model's input embeddings."""

    @property
    def hidden_size(self) -> int: ...

    def embedding_rows(self, token_ids: list[int]) -> NDArray[np.float32]: ...


class TokenTableEmbedder:
    """The paper's embedder: the model's own input table, read from the mapped checkpoint."""

    name = TOKEN_TABLE

    def __init__(self, table: EmbeddingTable) -> None:
        self._table = table

    @property
    def dimension(self) -> int:
        return self._table.hidden_size

    def embed(self, token_ids: list[int]) -> NDArray[np.float32]:
        ids, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
        rows = self._table.embedding_rows(ids.tolist())  # [unique, hidden]
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))  # [unique]
        # A token whose embedding is zero has no direction and adds nothing.
        weights = np.divide(
            counts, lengths, out=np.zeros(len(ids), np.float32), where=lengths > 0, casting="unsafe"
        )
        total = weights @ rows  # [hidden]
        length = float(np.linalg.norm(total))
        vector: NDArray[np.float32] = total / length if length > 0 else total
        return vector.astype(np.float32)
