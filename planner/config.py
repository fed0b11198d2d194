"""Settings of the planner, from `REMOE_PLANNER_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from remoe.settings import ServiceSettings

__all__ = ["PlannerSettings"]


class PlannerSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="REMOE_PLANNER_", frozen=True, extra="ignore")

    history: Path | None = None
    """A history file to begin with (`history.npz`), taken in once; without one, predictions are
    uniform until prompts have been observed."""

    history_dir: Path | None = None
    """Where the durable history is kept, in a file for each model and embedder. Without it,
    observed prompts are forgotten when the planner stops."""

    history_capacity: int = Field(20_000, ge=1, le=1_000_000)
    """Most prompts remembered; when full, the most similar ones are folded together."""

    embedder: Literal["token-table", "token-table+minilm"] = "token-table"
    """How prompts become vectors; a history belongs to one. MiniLM predicts better and takes tens
    of milliseconds of a core; see docs/planner.md."""

    predictor: Literal["regression", "sps", "exact", "mean", "uniform"] = "regression"
    """How profiles are predicted: the default, the paper's similar prompts by its tree or by exact
    search, the mean of all prompts, or nothing at all."""

    remote_ratio: float = Field(0.5, ge=0, le=1)
    """b: the share of each layer's experts that is remote, rounded down to whole experts."""

    neighbours: int = Field(15, ge=1, le=1000)
    """alpha: how many similar prompts a prediction rests on."""

    temperature: float = Field(1.0, gt=0, le=100)
    """Of the softmax over similarities in `sps` and `exact`; 1 is the paper's, lower trusts the
    nearest more."""

    prewarm_routes: float = Field(1.0, gt=0)
    """An expert function is pre-warmed from this many expected routes on."""

    claim_window_s: float = Field(30.0, gt=0, le=3600)
    """How long after its plan a request can still decide what a starting main function loads."""

    main_runtime_gb: float = Field(0.7, ge=0, le=1000)
    """Memory of the main function besides weights and key-value cache: interpreter, libraries,
    activations. A setting until the hardware profile measures it."""

    expert_runtime_gb: float = Field(0.05, ge=0, le=1000)
    """The same for an expert function."""

    expert_expansion: float = Field(2.0, ge=1, le=4)
    """Resident bytes of a remote expert per stored byte; 2 where bfloat16 is widened to float32."""

    adaptation: float = Field(0.1, gt=0, le=1)
    """Weight of the newest request in the measured times, which are moving averages."""
