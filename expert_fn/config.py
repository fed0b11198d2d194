"""Settings of an expert function, from `REMOE_EXPERT_*`.

Read with msgspec where other services use pydantic-settings, whose import is a third of what this
function needs from spawn to ready; the errors and `--print-config` are the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from remoe.errors import SettingsError
from remoe.expert_call import MAX_BODY_BYTES
from remoe.kernel.interface import KernelChoice
from remoe.topology import Topology

__all__ = ["ExpertSettings"]

_Layer = Annotated[int, msgspec.Meta(ge=0)]
_SHARED = {"topology": "REMOE_TOPOLOGY", "log_level": "REMOE_LOG_LEVEL"}


class ExpertSettings(msgspec.Struct, frozen=True, kw_only=True):
    topology: str
    """Path of the deployment's topology file."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    first_layer: _Layer
    """First decoder layer whose experts this function computes."""

    last_layer: _Layer
    """Last such layer, included."""

    kernel: KernelChoice = "auto"
    """`native` fails where that was not built; `auto` falls back to numpy and says so."""

    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """Threads of the native kernel, the caller's included."""

    payload_limit_bytes: Annotated[int, msgspec.Meta(ge=65_536, le=2**31)] = MAX_BODY_BYTES
    """Largest body taken and given; callers split at REMOE_MAIN_PAYLOAD_LIMIT_BYTES."""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the environment; raises SettingsError naming each bad variable."""
        values: dict[str, object] = {}
        problems = []
        for field in msgspec.structs.fields(cls):
            variable = _SHARED.get(field.name, f"REMOE_EXPERT_{field.name.upper()}")
            if variable in environment:
                try:
                    values[field.name] = msgspec.convert(
                        environment[variable], field.type, strict=False
                    )
                except msgspec.ValidationError as error:
                    problems.append(f"{variable}: {error}, not {environment[variable]!r}")
            elif field.required:
                problems.append(f"{variable}: must be set")
        if not problems:
            settings = cls(**values)  # type: ignore[arg-type]  # each was checked
            if settings.first_layer <= settings.last_layer:
                return settings
            problems.append("REMOE_EXPERT_LAST_LAYER: is below REMOE_EXPERT_FIRST_LAYER")
        raise SettingsError("bad settings:\n  " + "\n  ".join(problems))

    @classmethod
    def read_or_exit(cls) -> Self:
        """For `__main__`: print what is wrong and exit; `--print-config` shows and exits 0."""
        try:
            settings = cls.read()
        except SettingsError as error:
            sys.exit(error.message)
        if "--print-config" in sys.argv[1:]:
            shown = msgspec.json.format(msgspec.json.encode(settings), indent=2)
            sys.stdout.write(shown.decode() + "\n")
            sys.exit(0)
        return settings

    def load_topology(self) -> Topology:
        return Topology.load(Path(self.topology))
