"""Where everything is: the one file a deployment's services read to find each other.

The runtime writes it (a file locally, a ConfigMap on a cluster) and passes its path in
`REMOE_TOPOLOGY`. URLs are stable: they hold while the function behind them is at zero.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from remoe.errors import CheckpointError, SettingsError

__all__ = ["ExpertEndpoint", "Topology", "socket_path", "socket_url"]

_UNIX = "unix://"


def socket_url(path: Path) -> str:
    """The URL of a socket in this machine's file system, by its absolute path."""
    return f"{_UNIX}{path}"


def socket_path(url: str) -> str | None:
    """The path in such a URL; None of any other."""
    return url.removeprefix(_UNIX) if url.startswith(_UNIX) else None


class ExpertEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One expert function: it can compute any expert of layers `first_layer` to `last_layer`.

    It speaks HTTP at `url`, `http://host:port` or, on this machine alone, `unix:///path`.
    """

    name: str
    url: str
    first_layer: int
    last_layer: int
    memory_gb: float


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    model_dir: str
    gateway_url: str
    planner_url: str
    main_url: str
    main_memory_gb: float
    experts: list[ExpertEndpoint]
    model_digest: str = ""
    """Of the weights that this deployment was made for; empty where the runtime vouches for them."""

    @classmethod
    def load(cls, path: Path) -> Topology:
        """Read and check the file; raises SettingsError that names the path and the field."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise SettingsError(
                f"cannot read the topology file {path}: {error.strerror}. Set REMOE_TOPOLOGY to "
                "the file that `remoe up` wrote, or start services with `remoe up`."
            ) from error
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path} is not a topology file: {error}") from error

    def check_weights(self, digest: str) -> None:
        """Raise CheckpointError if the deployment was made for other weights than these."""
        if self.model_digest and digest != self.model_digest:
            raise CheckpointError(
                f"{self.model_dir} holds {digest}, and this deployment was made for "
                f"{self.model_digest}: put the right weights there, or deploy again with these"
            )

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))

    def expert_for(self, layer: int) -> ExpertEndpoint:
        """The function that holds a layer's experts; raises SettingsError if none does."""
        for endpoint in self.experts:
            if endpoint.first_layer <= layer <= endpoint.last_layer:
                return endpoint
        raise SettingsError(f"no expert function holds layer {layer}; check the topology file")
