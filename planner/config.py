"""Settings of the planner, from `REMOE_PLANNER_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from remoe.errors import SettingsError
from remoe.hardware import HardwareProfile
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

    ratio_rule: Literal["fixed", "largest", "cost", "per-layer"] = "cost"
    """How b is chosen, up to `remote_ratio`: that itself, the largest that holds the SLO (the
    paper's), the cheapest, or the cheapest for each layer. Without a hardware profile always
    `fixed`."""

    hardware: Path | None = None
    """The hardware profile to optimise with; `remoe profile hardware` writes one."""

    platform: Literal["deployed", "proportional", "lambda", "cloud-run", "fargate"] = "deployed"
    """Whose memory specs expert functions can have. `deployed`: only what they run with."""

    granularity: Literal["expert", "layer", "block"] = "block"
    """What one expert function holds; a block is the layers that one is deployed with."""

    function_vcpus: float = Field(1.0, gt=0, le=1024)
    """Cores of a deployed expert function, for platform `deployed`."""

    robust: bool = True
    """Compare SLOs with the tails of what was measured rather than with means."""

    solver: Literal["lagrangian", "milp"] = "lagrangian"
    """Who solves the memory problem; `milp` needs the extra planner-milp and takes longer."""

    payload_bytes: int = Field(6_000_000, ge=1_000)
    """The most that one call of an expert function carries each way."""

    max_replicas: int = Field(1, ge=1, le=64)
    """The most replicas of an expert function that one prompt is split over. The main function
    makes one call for a layer, so more of them serve more requests, and not one faster."""

    function_replicas: int = Field(1, ge=1, le=1000)
    """The most replicas that a policy asks for of one function (REMOE_MAIN_FUNCTION_REPLICAS)."""

    gpu_speedup: float = Field(10.0, gt=0)
    """How much faster than here a GPU is taken to be in the comparisons that need one (GPU,
    Fetch). An assumption, and shown as one, unless the main function has a GPU."""

    rows_per_pass: int = Field(256, ge=1)
    """Tokens of a prompt that the main function reads at once (REMOE_MAIN_BATCH_TOKENS)."""

    epoch_window_s: float = Field(900.0, gt=0)
    """How far back the demand reaches that epoch plans are made for."""

    adapt_every_s: float = Field(60.0, ge=0)
    """How often the running partition is reviewed, and changed if that pays within the main
    function's memory; 0 for never. Takes a hardware profile."""

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

    def load_hardware(self, model_digest: str) -> HardwareProfile | None:
        """The profile, if one is set; raises SettingsError if it is another model's."""
        if self.hardware is None:
            return None
        profile = HardwareProfile.load(self.hardware)
        if profile.model_digest != model_digest:
            raise SettingsError(
                f"REMOE_PLANNER_HARDWARE: {self.hardware} was measured with another model "
                f"({profile.model}, {profile.model_digest}); run `remoe profile hardware`."
            )
        return profile
