"""How the gateway of `remoe up` is reached, checked before anything starts."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from remoe.accounts.database import open_database
from remoe.accounts.keys import list_keys
from remoe.errors import SettingsError

__all__ = ["FrontDoor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoor:
    """Options of `remoe up`; `ledger` is a database URL."""

    host: str
    auth: str | None
    tls_cert: Path | None
    tls_key: Path | None
    cors_origins: tuple[str, ...]
    ledger: str

    def environment(self) -> dict[str, str]:
        """The gateway's settings; raises SettingsError for what it would refuse to start with."""
        env = {"REMOE_GATEWAY_LEDGER": self.ledger}
        if self.auth is not None:
            env["REMOE_GATEWAY_AUTH"] = self.auth
        if self.cors_origins:
            env["REMOE_GATEWAY_CORS_ORIGINS"] = ",".join(self.cors_origins)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("TLS needs both --tls-cert and --tls-key")
        if self.tls_cert is not None and self.tls_key is not None:
            _check_certificate(self.tls_cert, self.tls_key)
            env["REMOE_GATEWAY_TLS_CERT"] = str(self.tls_cert.absolute())
            env["REMOE_GATEWAY_TLS_KEY"] = str(self.tls_key.absolute())
        who = self.auth or os.environ.get("REMOE_GATEWAY_AUTH", "auto")
        if who == "auto" and not _is_loopback(self.host):
            self._check_keys()
        return env

    def _check_keys(self) -> None:
        engine = open_database(self.ledger)
        try:
            keys = list_keys(engine)
        finally:
            engine.dispose()
        if not keys:
            raise SettingsError(
                f"{self.host} can be reached from other machines, and there is no API key yet. "
                "Make one with `remoe key create NAME`, or pass --auth off to let everybody in."
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise SettingsError(f"--host is an IP address such as 0.0.0.0, not '{host}'") from error


def _check_certificate(cert: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used: {error.strerror or error}"
        ) from error
