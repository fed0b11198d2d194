"""Settings of the main-model function, from `REMOE_MAIN_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from remoe.expert_call import MAX_BODY_BYTES, TOKEN_VARIABLE
from remoe.moeless.function_balance import Policy
from remoe.moeless.scaler import CV_THRESHOLD
from remoe.settings import ServiceSettings

__all__ = ["MainSettings"]


class MainSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="REMOE_MAIN_", frozen=True, extra="ignore")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; `auto` is the checkpoint's own."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where everything but experts is computed, and the key-value cache lies; `auto` is the GPU if
    there is one."""

    gpu_experts_gb: float | None = Field(None, ge=0, le=10_000)
    """How much of the GPU's memory experts may take: the hottest of those here are kept in it. Unset
    is what the rest of the model and the key-value cache leave."""

    kernel: Literal["auto", "native", "torch"] = "auto"
    """What computes experts, and linear layers on the CPU: compiled code on the CPU, with a GPU both
    of them, or torch alone. `auto` is native where the library was built."""

    threads: int = Field(0, ge=0, le=1024)
    """Threads of the native kernel; 0 is one for each processor this process may use, less one
    beside a GPU."""

    kv_tokens: int = Field(16_384, ge=512, le=4_194_304)
    """Tokens the key-value cache holds, over all concurrent requests."""

    page_tokens: int = Field(32, ge=8, le=1024)
    """Tokens in one page of the key-value cache."""

    batch_tokens: int = Field(256, ge=16, le=65_536)
    """Most tokens in one engine step; longer prompts are prefilled in pieces."""

    max_requests: int = Field(16, ge=1, le=1024)
    """Most requests in one engine step."""

    max_queue: int = Field(256, ge=1, le=65_536)
    """Requests admitted at once, running and waiting; more get 429."""

    call_timeout_s: float = Field(10.0, gt=0, le=600)
    """How long one remote expert call may take, the function's cold start included."""

    hedge_floor_s: float = Field(0.02, gt=0, le=600)
    """How late, at the least, a reply must be before another replica is asked as well."""

    payload_limit_bytes: int = Field(MAX_BODY_BYTES, ge=65_536, le=2**31)
    """Largest body of an expert call or its reply; at most REMOE_EXPERT_PAYLOAD_LIMIT_BYTES."""

    expert_token: SecretStr = Field(SecretStr(""), validation_alias=TOKEN_VARIABLE)
    """What expert functions ask for, if they do; a cluster's deployment gives both a Secret."""

    transport: Literal["http", "in-process"] = "http"
    """How remote experts are reached; `in-process` computes them here, without functions."""

    policy: Policy = "remoe"
    """Who decides where experts are computed: the planner alone (`remoe`), loads foretold in flight
    (`moeless`), or those seeded by each prompt's prediction (`joint`)."""

    prediction_distance: int = Field(1, ge=1, le=5)
    """How many MoE layers ahead loads are foretold."""

    cv_threshold: float = Field(CV_THRESHOLD, ge=0, le=10)
    """The scaler adds replicas while loads vary more than this."""

    function_replicas: int = Field(1, ge=1, le=1000)
    """Most replicas the policies ask for of one function; more than there are cores for slow it."""

    runtime_control: Path | None = Field(None, validation_alias="REMOE_RUNTIME_CONTROL")
    """The local runtime's control socket."""
