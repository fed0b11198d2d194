"""A history as a file to keep, copy and ship: a `.npz` with one row per prompt and no text.

`vectors` float16 [n, dimension] · `profiles` float16 [n, layers, experts], of prefill · `n_tokens`
int32 [n] · `topic` int32 [n], an index into `topics` (strings) · `model_digest` (string). Absent
from files that `remoe profile` wrote: `decode_profiles`, as `profiles` (absent from old ones only),
`decode_tokens`, `demand`, `decoded`, `first_seen_s`, `last_seen_s`, float64 [n], and `embedder`.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.embedding import TOKEN_TABLE
from planner.history_store import Entry, HistoryIdentity
from planner.phases import normalise_rows
from remoe.errors import SettingsError

__all__ = ["HistoryEntries", "read_history", "write_history"]

_ARRAYS = ("vectors", "profiles", "n_tokens", "topic", "topics", "model_digest")
_DECODE = "decode_profiles"
_NUMBERS = ("decode_tokens", "demand", "decoded", "first_seen_s", "last_seen_s")
_EMBEDDER = "embedder"
# What zipfile and numpy raise on bytes that are no archive of arrays: a flipped bit in a zip header
# can claim encryption or an unknown compression (RuntimeError), and one bare array is no mapping.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
_ROW_SUM_TOLERANCE = 0.02  # float16 shares, rounded one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntries:
    """Checked contents of a file, in its order; `topic` indexes `topics`."""

    vectors: NDArray[np.float32]  # [n, dimension], unit length
    profiles: NDArray[np.float32]  # [n, layers, experts], rows sum to 1 or are zero: prefill
    decode_profiles: NDArray[np.float32] | None  # the same of decode; None where it is not known
    n_tokens: NDArray[np.int32]  # [n]
    topic: NDArray[np.int32]  # [n]
    topics: tuple[str, ...]
    numbers: dict[str, NDArray[np.float64]]  # [n] each: an Entry's other fields
    digest: str  # of the file's bytes

    def __iter__(self) -> Iterator[Entry]:
        decode = self.profiles if self.decode_profiles is None else self.decode_profiles
        for row, vector in enumerate(self.vectors):
            yield Entry(
                id=row,
                vector=vector,
                prefill=self.profiles[row],
                decode=decode[row],
                n_tokens=int(self.n_tokens[row]),
                topic=self.topics[self.topic[row]],
                **{name: float(values[row]) for name, values in self.numbers.items()},
            )


def read_history(path: Path, identity: HistoryIdentity) -> HistoryEntries:
    """Read and check a file; raises SettingsError that says what is wrong with it.

    Vectors are scaled back to unit length and profile rows to sum 1, which float16 only nears.
    """
    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, NDArray[np.generic]] = {name: file[name] for name in _ARRAYS}
            optional = (_DECODE, _EMBEDDER, *_NUMBERS)
            arrays |= {name: file[name] for name in optional if name in file}
            raw.seek(0)
            file_digest = hashlib.file_digest(raw, "sha256").hexdigest()
    except KeyError as error:
        raise _bad(path, f"it has no array {error}") from error
    except _UNREADABLE as error:
        raise _bad(path, f"it cannot be read: {error}") from error
    _check_identity(path, arrays, identity)
    _check_shapes(path, arrays, identity)
    vectors = arrays["vectors"].astype(np.float32)
    n_tokens = arrays["n_tokens"].astype(np.int32)
    topic = arrays["topic"].astype(np.int32)
    topics = tuple(str(name) for name in arrays["topics"])
    if not np.isfinite(vectors).all():
        raise _bad(path, "vectors holds numbers that are not finite")
    if (n_tokens < 1).any():
        raise _bad(path, "n_tokens holds numbers below 1")
    if len(topic) and not 0 <= topic.min() <= topic.max() < len(topics):
        raise _bad(path, f"topic names a topic outside 0..{len(topics) - 1}")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)  # [n, 1]
    decode = _shares(path, arrays, _DECODE) if _DECODE in arrays else None
    return HistoryEntries(
        vectors=(vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32),
        profiles=_shares(path, arrays, "profiles"),
        decode_profiles=decode,
        n_tokens=n_tokens,
        topic=topic,
        topics=topics,
        numbers=_numbers(path, arrays, decoded=decode is not None),
        digest=file_digest,
    )


def write_history(path: Path, entries: Iterable[Entry], identity: HistoryIdentity) -> int:
    """Write entries, all or nothing, and return how many; `read_history` gives them back."""
    rows = list(entries)
    topics = sorted({row.topic for row in rows})
    number = {topic: index for index, topic in enumerate(topics)}
    shape = (len(rows), identity.layers, identity.experts)
    arrays = {
        "vectors": np.array([row.vector for row in rows], np.float16).reshape(
            len(rows), identity.dimension
        ),
        "profiles": np.array([row.prefill for row in rows], np.float16).reshape(shape),
        _DECODE: np.array([row.decode for row in rows], np.float16).reshape(shape),
        "n_tokens": np.array([row.n_tokens for row in rows], np.int32),
        "topic": np.array([number[row.topic] for row in rows], np.int32),
        "topics": np.array(topics, np.str_),
        "model_digest": np.array(identity.model_digest),
        _EMBEDDER: np.array(identity.embedder),
    }
    arrays |= {name: np.array([getattr(row, name) for row in rows], float) for name in _NUMBERS}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # typeshed's **kwds
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return len(rows)


def _numbers(
    path: Path, arrays: dict[str, NDArray[np.generic]], *, decoded: bool
) -> dict[str, NDArray[np.float64]]:
    count = len(arrays["n_tokens"])
    # A profiled prompt came once and was answered; how long the answer was is not in the file.
    numbers = dict.fromkeys(_NUMBERS, np.zeros(count))
    numbers |= {"demand": np.ones(count), "decoded": np.full(count, float(decoded))}
    numbers |= {name: arrays[name].astype(np.float64) for name in _NUMBERS if name in arrays}
    for name, values in numbers.items():
        if not (np.isfinite(values) & (values >= (name == "demand"))).all():
            raise _bad(path, f"{name} holds numbers that are not finite or too small")
    return numbers


def _shares(path: Path, arrays: dict[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
    profiles = arrays[name].astype(np.float32)
    if not np.isfinite(profiles).all():
        raise _bad(path, f"{name} holds numbers that are not finite")
    sums = profiles.sum(axis=2, keepdims=True)  # [n, layers, 1]
    if (profiles < 0).any() or not (np.abs(sums - 1) < _ROW_SUM_TOLERANCE)[sums != 0].all():
        raise _bad(path, f"a row of {name} does not sum to 1")
    return normalise_rows(profiles)


def _check_identity(
    path: Path, arrays: dict[str, NDArray[np.generic]], identity: HistoryIdentity
) -> None:
    digest = str(arrays["model_digest"])
    if digest != identity.model_digest:
        raise SettingsError(
            f"The history {path} was made with the model {digest}, but this deployment's model is "
            f"{identity.model_digest}. Use a history of this model, or none to start empty."
        )
    embedder = str(arrays.get(_EMBEDDER, TOKEN_TABLE))
    if embedder != identity.embedder:
        raise SettingsError(
            f"The history {path} was made with the embedder {embedder}, but this planner's is "
            f"{identity.embedder}. `remoe history embed` makes it over."
        )


def _check_shapes(
    path: Path, arrays: dict[str, NDArray[np.generic]], identity: HistoryIdentity
) -> None:
    count = len(arrays["n_tokens"]) if arrays["n_tokens"].ndim else 0
    wanted = {
        "vectors": ((count, identity.dimension), "f"),
        "profiles": ((count, identity.layers, identity.experts), "f"),
        "n_tokens": ((count,), "iu"),
        "topic": ((count,), "iu"),
        "topics": ((arrays["topics"].size,), "U"),
    }
    wanted |= {name: ((count,), "f") for name in _NUMBERS if name in arrays}
    if _DECODE in arrays:
        wanted[_DECODE] = wanted["profiles"]
    for name, (shape, kinds) in wanted.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in kinds:
            raise _bad(path, f"{name} is {array.dtype} {list(array.shape)}, expected {list(shape)}")


def _bad(path: Path, problem: str) -> SettingsError:
    return SettingsError(
        f"{path} is not a usable history: {problem}. Build it again, or do without it to start "
        "with an empty history."
    )
