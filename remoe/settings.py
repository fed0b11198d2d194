"""One frozen settings class per service: environment in, a checked object out.

A service subclasses `ServiceSettings` with its own prefix, reads it once at start, and passes it
on. Bad values fail before any port is bound, naming the variable.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from remoe.errors import SettingsError
from remoe.prices import DEFAULT_PRICE_BOOK, PriceBook, load_prices
from remoe.topology import Topology

__all__ = ["ServiceSettings"]


class ServiceSettings(BaseSettings):
    """What every service has. `topology` is shared by all and has no service prefix."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    topology: Path = Field(validation_alias="REMOE_TOPOLOGY")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", validation_alias="REMOE_LOG_LEVEL"
    )

    prices: str = Field(DEFAULT_PRICE_BOOK, validation_alias="REMOE_PRICES")

    @classmethod
    def read(cls) -> Self:
        """Read the environment; raises SettingsError naming each bad variable."""
        try:
            return cls()  # type: ignore[call-arg]  # the environment gives the fields
        except ValidationError as error:
            prefix = cls.model_config.get("env_prefix", "")
            problems = [
                f"{name if name.startswith('REMOE_') else prefix + name.upper()}: {issue['msg']}"
                for issue in error.errors()
                for name in [str(issue["loc"][0]) if issue["loc"] else "REMOE_*"]
            ]
            raise SettingsError("bad settings:\n  " + "\n  ".join(problems)) from error

    @classmethod
    def read_or_exit(cls) -> Self:
        """For `__main__`: print what is wrong and exit 2; `--print-config` shows and exits 0."""
        try:
            settings = cls.read()
        except SettingsError as error:
            sys.exit(f"{error.message}")
        if "--print-config" in sys.argv[1:]:
            sys.stdout.write(settings.model_dump_json(indent=2) + "\n")
            sys.exit(0)
        return settings

    def load_prices(self) -> PriceBook:
        """The price book of that name or path; raises SettingsError."""
        return load_prices(self.prices)

    def load_topology(self) -> Topology:
        return Topology.load(self.topology)
