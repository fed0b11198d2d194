"""The gateway's settings, `REMOE_GATEWAY_*`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from remoe.settings import ServiceSettings

__all__ = ["GatewaySettings"]


class GatewaySettings(ServiceSettings):
    """Limits on what a client may ask, and on how long the gateway waits for whom."""

    model_config = SettingsConfigDict(
        env_prefix="REMOE_GATEWAY_", frozen=True, extra="ignore", populate_by_name=True
    )

    max_body_bytes: int = Field(8_000_000, ge=1_000)
    # Samples of one prompt (`n`), and samples times prompts of one request.
    max_samples: int = Field(16, ge=1, le=128)
    max_choices: int = Field(64, ge=1)
    # Answers that wait or run at once, of all requests; further ones are told when to come back.
    max_open: int = Field(256, ge=1)
    # Planning only helps: a request goes on without a plan rather than wait longer than this.
    plan_timeout_s: float = Field(2.0, gt=0)
    # From asking the main function to its response headers, its cold start included.
    cold_start_timeout_s: float = Field(300.0, gt=0)
    # Between two events of a running generation.
    stall_timeout_s: float = Field(120.0, gt=0)
    # A streaming client hears something at least this often, from the first such period on.
    heartbeat_s: float = Field(1.0, gt=0)
