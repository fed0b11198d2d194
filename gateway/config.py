"""The gateway's settings, `REMOE_GATEWAY_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from remoe.accounts.writer import OnFailure
from remoe.moeless.function_balance import Policy
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
    # From asking the main function to its response headers, its cold start included. One that
    # is known to run all that time has `silence_timeout_s`.
    cold_start_timeout_s: float = Field(300.0, gt=0)
    # Between two signs of life of a running generation; the main function gives one each second.
    silence_timeout_s: float = Field(15.0, gt=1)
    # Between two events of a running generation that bring it forward.
    stall_timeout_s: float = Field(120.0, gt=0)
    # A streaming client hears something at least this often, from the first such period on.
    heartbeat_s: float = Field(1.0, gt=0)

    # A database URL (sqlite:////path or postgresql://...); without one nothing is written down,
    # and there are no keys.
    ledger: str | None = None
    # While the ledger cannot be written: "refuse" requests, or "serve" and keep rows in memory.
    ledger_failure: OnFailure = "refuse"
    # How long a finished answer waits for the ledger before it is given up.
    ledger_patience_s: float = Field(5.0, gt=0, le=60)
    # Who needs a key: everybody, nobody, or ("auto") whoever comes over more than loopback.
    auth: Literal["auto", "required", "off"] = "auto"
    # Origins whose pages may call this server ("*" for all), comma-separated.
    cors_origins: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # The local supervisor's control socket, from which live replicas are known;
    # on a cluster the Kubernetes API is asked instead.
    runtime_control: Path | None = Field(None, validation_alias="REMOE_RUNTIME_CONTROL")

    # Who decides where experts are computed (REMOE_MAIN_POLICY says the same to the main function).
    policy: Policy = "remoe"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both REMOE_GATEWAY_TLS_CERT and REMOE_GATEWAY_TLS_KEY")
        if self.auth == "required" and self.ledger is None:
            raise ValueError("keys are kept in the ledger: set REMOE_GATEWAY_LEDGER too")
        return self
