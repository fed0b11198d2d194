"""Packs documents into rows of equal length that share one copy of the system turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PREFIX, PADDING = -1, -2


@dataclass(frozen=True, slots=True)
class Piece:
    """One document to pack, with a loss weight for predicting each of its tokens."""

    ids: NDArray[np.int32]  # [tokens]
    weights: NDArray[np.float32]  # [tokens]
    after_prefix: bool = True


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows.

    A token attends to its own document and, in a row that has one, to the prefix. Positions continue the
    prefix's in every document, so each is computed as if it stood alone behind the prefix.
    """

    ids: NDArray[np.int32]  # [rows, length]
    positions: NDArray[np.int32]  # [rows, length]
    documents: NDArray[np.int32]  # [rows, length]; PREFIX or PADDING where no document
    weights: NDArray[
        np.float32
    ]  # [rows, length]: of the loss of predicting the token AT this place
    previous: NDArray[np.int32]  # [rows, length]: place whose hidden state predicts this token

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: NDArray[np.int64]) -> Rows:
        """Return some rows."""
        return Rows(
            self.ids[index],
            self.positions[index],
            self.documents[index],
            self.weights[index],
            self.previous[index],
        )


def pack(pieces: Sequence[Piece], prefix: Sequence[int], length: int, seed: int) -> Rows:
    """Shuffle the pieces and pack them first-fit; those with and without the prefix go to separate rows."""
    longest = length - len(prefix)
    pieces = [
        Piece(piece.ids[:longest], piece.weights[:longest], piece.after_prefix) for piece in pieces
    ]
    order = np.random.default_rng(seed).permutation(len(pieces))
    rows = [
        row
        for with_prefix in (True, False)
        for row in _fill(
            [pieces[i] for i in order if pieces[i].after_prefix == with_prefix],
            list(prefix) if with_prefix else [],
            length,
        )
    ]
    shape = (len(rows), length)
    packed = Rows(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.full(shape, PADDING, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
    )
    for row, (start, members) in enumerate(rows):
        packed.ids[row, :start] = prefix[:start]
        packed.positions[row, :start] = np.arange(start)
        packed.documents[row, :start] = PREFIX
        at = start
        for number, piece in enumerate(members):
            end = at + len(piece.ids)
            packed.ids[row, at:end] = piece.ids
            packed.positions[row, at:end] = np.arange(start, start + len(piece.ids))
            packed.documents[row, at:end] = number
            packed.weights[row, at:end] = piece.weights
            packed.previous[row, at:end] = np.arange(at, end) - 1
            packed.previous[row, at] = max(start - 1, 0)
            if start == 0:
                packed.weights[row, at] = 0.0  # nothing precedes the first token of plain text
            at = end
    return packed


def _fill(pieces: list[Piece], prefix: list[int], length: int) -> list[tuple[int, list[Piece]]]:
    start = len(prefix)
    rows: list[tuple[int, list[Piece]]] = []
    open_rows: list[tuple[int, list[Piece]]] = []
    for piece in pieces:
        size = len(piece.ids)
        for slot, (used, members) in enumerate(open_rows):
            if used + size <= length:
                members.append(piece)
                open_rows[slot] = (used + size, members)
                break
        else:
            open_rows.append((start + size, [piece]))
            if len(open_rows) > 16:  # first-fit over a few rows wastes under 2 % and stays linear
                fullest = max(range(len(open_rows)), key=lambda i: open_rows[i][0])
                rows.append((start, open_rows.pop(fullest)[1]))
    return rows + [(start, members) for _, members in open_rows]
