"""Small real things to plan with: a checkpoint on disk, a history file, a clock that is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.config import PlannerSettings
from planner.embedding import TOKEN_TABLE
from planner.history_store import HistoryIdentity
from planner.model import ModelFacts
from planner.phases import PhaseProfiles
from planner.planning import Planner
from remoe.checkpoint import Checkpoint
from remoe.experts import ActivationProfile, ExpertId
from remoe.families import family_of
from remoe.plan import Observation, PlanRequest
from remoe.topology import ExpertEndpoint, Topology

LAYERS, EXPERTS, TOP_K, HIDDEN, VOCAB, CONTEXT = 3, 4, 2, 8, 32, 64
MODEL = "tiny-moe"


@dataclass
class ToldClock:
    """A clock that moves when told."""

    now: float = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def write_checkpoint(folder: Path, moe_layers: Iterable[int]) -> None:
    """A Mixtral-shaped checkpoint of random float32 tensors, enough for everything numpy reads."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)}
    for layer in moe_layers:
        for index in range(EXPERTS):
            names = family_of("mixtral").expert_names(ExpertId(layer, index))
            for name, shape in zip(names, ((4, HIDDEN), (4, HIDDEN), (HIDDEN, 4)), strict=True):
                tensors[name] = rng.standard_normal(shape).astype(np.float32)
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    encoded = msgspec.json.encode(header)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def write_topology(path: Path, model_dir: Path) -> None:
    Topology(
        model=MODEL,
        model_dir=str(model_dir),
        gateway_url="http://127.0.0.1:1",
        planner_url="http://127.0.0.1:2",
        main_url="http://127.0.0.1:3",
        main_memory_gb=1.0,
        experts=[
            ExpertEndpoint(
                name="experts-00-01",
                url="http://127.0.0.1:4",
                first_layer=0,
                last_layer=1,
                memory_gb=0.25,
            ),
            ExpertEndpoint(
                name="experts-02-02",
                url="http://127.0.0.1:5",
                first_layer=2,
                last_layer=2,
                memory_gb=0.25,
            ),
        ],
    ).save(path)


def history_arrays(model: ModelFacts, entries: int) -> dict[str, NDArray[np.generic]]:
    """What a history file holds; entry i leans on expert i modulo K in every layer."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((entries, model.hidden_size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    profiles = rng.dirichlet(np.ones(model.experts), (entries, model.layers))
    profiles[np.arange(entries), :, np.arange(entries) % model.experts] += 1
    profiles /= profiles.sum(axis=2, keepdims=True)
    decode = rng.dirichlet(np.ones(model.experts), (entries, model.layers))
    return {
        "vectors": vectors.astype(np.float16),
        "profiles": profiles.astype(np.float16),
        "decode_profiles": decode.astype(np.float16),
        "n_tokens": rng.integers(1, 50, entries).astype(np.int32),
        "topic": (np.arange(entries) % 2).astype(np.int32),
        "topics": np.array(["algebra", "cooking"]),
        "model_digest": np.array(model.digest),
    }


def save_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> Path:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path


@dataclass
class World:
    """A checkpoint and topology on disk, and planners over them."""

    folder: Path
    clock: ToldClock

    @classmethod
    def make(cls, folder: Path, moe_layers: Iterable[int] = range(LAYERS)) -> World:
        write_checkpoint(folder / "model", moe_layers)
        write_topology(folder / "topology.json", folder / "model")
        return cls(folder, ToldClock())

    @property
    def topology_path(self) -> Path:
        return self.folder / "topology.json"

    @property
    def model(self) -> ModelFacts:
        return ModelFacts.of(Checkpoint.open(self.folder / "model"), MODEL)

    @property
    def identity(self) -> HistoryIdentity:
        """Of a history of this world's model, by the paper's embedder."""
        model = self.model
        return HistoryIdentity(
            model.digest, TOKEN_TABLE, model.hidden_size, model.layers, model.experts
        )

    def history_file(self, entries: int = 20) -> Path:
        return save_arrays(self.folder / "history.npz", history_arrays(self.model, entries))

    def settings(self, **changes: object) -> PlannerSettings:
        return PlannerSettings.model_validate({"REMOE_TOPOLOGY": self.topology_path, **changes})

    def planner(self, **changes: object) -> Planner:
        return Planner.load(self.settings(**changes), clock=self.clock)

    def observation(self, tokens: list[int], **changes: object) -> Observation:
        """A finished request of 4 decode steps whose routes all went to experts 0 and 1."""
        counts = [[1, 1, 0, 0]] * LAYERS
        observation = Observation(
            plan_id="plan-unknown",
            model_digest=self.model.digest,
            prompt_tokens=tokens,
            prefill_counts=[[count * len(tokens) for count in row] for row in counts],
            decode_counts=[[count * 4 for count in row] for row in counts],
            ttft_s=0.5,
            tpot_s=0.1,
            cost_usd=1e-6,
        )
        return msgspec.structs.replace(observation, **changes)


def same_in_both(profile: ActivationProfile) -> PhaseProfiles:
    """What the paper assumes: one profile for prefill and decode."""
    return PhaseProfiles(profile, profile)


def ask(tokens: list[int], max_new_tokens: int = 5) -> PlanRequest:
    return PlanRequest(model=MODEL, prompt_tokens=tokens, max_new_tokens=max_new_tokens)
