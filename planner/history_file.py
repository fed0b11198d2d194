"""The shipped history: a `.npz` with one row per prompt and no text of any prompt.

`vectors` float16 [n, hidden] · `profiles` float16 [n, layers, experts], of prefill ·
`decode_profiles`, the same of decode, absent from older files · `n_tokens` int32 [n] · `topic`
int32 [n], an index into `topics` (strings) · `model_digest` (string).
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.history import HistoryEntries
from planner.model import ModelFacts
from planner.phases import normalise_rows
from remoe.errors import SettingsError

__all__ = ["read_history"]

_ARRAYS = ("vectors", "profiles", "n_tokens", "topic", "topics", "model_digest")
_DECODE = "decode_profiles"
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


def read_history(path: Path, model: ModelFacts) -> HistoryEntries:
    """Read and check a history; raises SettingsError that says what is wrong with the file.

    Vectors are scaled back to unit length and profile rows to sum 1, which float16 only nears.
    """
    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, NDArray[np.generic]] = {name: file[name] for name in _ARRAYS}
            if _DECODE in file:
                arrays[_DECODE] = file[_DECODE]
    except KeyError as error:
        raise _bad(path, f"it has no array {error}") from error
    except _UNREADABLE as error:
        raise _bad(path, f"it cannot be read: {error}") from error
    digest = str(arrays["model_digest"])
    if digest != model.digest:
        raise SettingsError(
            f"REMOE_PLANNER_HISTORY: {path} was made with the model {digest}, but this "
            f"deployment's model is {model.digest}. Point it to a history of this model, or "
            "unset it to start with an empty one."
        )
    _check_shapes(path, arrays, model)
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
    return HistoryEntries(
        vectors=(vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32),
        profiles=_shares(path, arrays, "profiles"),
        decode_profiles=_shares(path, arrays, _DECODE) if _DECODE in arrays else None,
        n_tokens=n_tokens,
        topic=topic,
        topics=topics,
    )


def _shares(path: Path, arrays: dict[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
    profiles = arrays[name].astype(np.float32)
    if not np.isfinite(profiles).all():
        raise _bad(path, f"{name} holds numbers that are not finite")
    sums = profiles.sum(axis=2, keepdims=True)  # [n, layers, 1]
    if (profiles < 0).any() or not (np.abs(sums - 1) < _ROW_SUM_TOLERANCE)[sums != 0].all():
        raise _bad(path, f"a row of {name} does not sum to 1")
    return normalise_rows(profiles)


def _check_shapes(path: Path, arrays: dict[str, NDArray[np.generic]], model: ModelFacts) -> None:
    count = len(arrays["n_tokens"]) if arrays["n_tokens"].ndim else 0
    wanted = {
        "vectors": ((count, model.hidden_size), "f"),
        "profiles": ((count, model.layers, model.experts), "f"),
        "n_tokens": ((count,), "iu"),
        "topic": ((count,), "iu"),
        "topics": ((arrays["topics"].size,), "U"),
    }
    if _DECODE in arrays:
        wanted[_DECODE] = wanted["profiles"]
    for name, (shape, kinds) in wanted.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in kinds:
            raise _bad(path, f"{name} is {array.dtype} {list(array.shape)}, expected {list(shape)}")


def _bad(path: Path, problem: str) -> SettingsError:
    return SettingsError(
        f"REMOE_PLANNER_HISTORY: {path} is not a usable history: {problem}. Build it again, or "
        "unset the variable to start with an empty history."
    )
