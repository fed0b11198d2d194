"""What a model's routers were given and chose, token by token: a folder of arrays.

Gate copies learn from it, and simulations replay it. No text is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from remoe.errors import CheckpointError

__all__ = ["Recording", "RecordingFacts"]

_FACTS = "recording.json"


class RecordingFacts(msgspec.Struct, frozen=True):
    """`layers` are the decoder layers with experts; all arrays count layers by their place in it."""

    model_digest: str
    layers: list[int]
    experts: int
    top_k: int
    hidden: int
    labels: list[str]  # "set/topic" of each prompt


@dataclass(frozen=True, slots=True)
class Recording:
    """Tokens of a prompt follow each other: first those it was read with, then those decoded."""

    folder: Path
    facts: RecordingFacts
    routes: NDArray[np.uint16]  # [tokens, layers, top_k]
    gates: NDArray[np.float32]  # [layers, experts, hidden]: the model's own
    prompt: NDArray[np.int32]  # [tokens]
    decoded: NDArray[np.bool_]  # [tokens]

    def hidden(self, layer: int) -> NDArray[np.float16]:
        """A layer's router inputs, [tokens, hidden], mapped from the file."""
        values: NDArray[np.float16] = np.load(self.folder / f"hidden-{layer}.npy", mmap_mode="r")
        return values

    def tokens_of(self, prompts: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which tokens belong to one of these prompts: [tokens]."""
        chosen: NDArray[np.bool_] = np.isin(self.prompt, prompts)
        return chosen

    def held_out(self) -> NDArray[np.bool_]:
        """Which prompts are not trained on, [prompts]: three of every ten, as the paper splits."""
        return np.arange(len(self.facts.labels)) % 10 >= 7

    @classmethod
    def write(
        cls,
        folder: Path,
        facts: RecordingFacts,
        *,
        routes: NDArray[np.uint16],
        gates: NDArray[np.float32],
        prompt: NDArray[np.int32],
        decoded: NDArray[np.bool_],
    ) -> Recording:
        """Write all but the hidden states, which lie there already, one file a layer."""
        for name, array in (
            ("routes", routes),
            ("gates", gates),
            ("prompt", prompt),
            ("decoded", decoded),
        ):
            np.save(folder / f"{name}.npy", array)
        (folder / _FACTS).write_bytes(msgspec.json.encode(facts))
        return cls(folder, facts, routes, gates, prompt, decoded)

    @classmethod
    def read(cls, folder: Path) -> Recording:
        """Raises CheckpointError if the folder is no whole recording."""
        try:
            facts = msgspec.json.decode((folder / _FACTS).read_bytes(), type=RecordingFacts)
            arrays = [
                np.load(folder / f"{name}.npy") for name in ("routes", "gates", "prompt", "decoded")
            ]
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise CheckpointError(
                f"{folder} is not a recording of routing ({error}); `remoe profile gates "
                "--keep-recording` makes one"
            ) from error
        return cls(folder, facts, *arrays)
