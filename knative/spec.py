"""What a function is, whoever runs it: local processes or a Knative cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from knative.policy import ScalingPolicy
from remoe.errors import SettingsError

__all__ = ["MAX_NAME_LENGTH", "FunctionSpec"]

# A DNS label has 63; Knative appends a revision number and puts a tag in front.
MAX_NAME_LENGTH = 45
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """A deployable unit: the program `python -m module`, its limits, and how it scales.

    `holds` says what is in it, for people ("layers 0-4, 40 experts"). `container_concurrency` is
    the most requests a replica is meant to handle at once, 0 for no limit. `cpu` is in cores.
    `annotations` are Knative's, in Knative's words. A `public` function is reachable from outside.
    Where all functions run on one machine, one with a `local_socket` listens in the file system,
    and not at a port (docs/adr/0018-calls-within-a-step.md).
    """

    name: str
    module: str
    holds: str = ""
    env: dict[str, str] = field(default_factory=dict)
    container_concurrency: int = 0
    timeout_s: int = 300
    cpu: float = 1.0
    memory_mib: int = 512
    annotations: dict[str, str] = field(default_factory=dict)
    public: bool = False
    local_socket: bool = False

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME_LENGTH or not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"function name {self.name!r}: use lower-case letters, digits and dashes, "
                f"at most {MAX_NAME_LENGTH}"
            )
        for name, value in (
            ("cpu", self.cpu),
            ("memory_mib", self.memory_mib),
            ("timeout_s", self.timeout_s),
        ):
            if value <= 0:
                raise SettingsError(f"{self.name}: {name} is {value}; it must be above 0")
        if self.container_concurrency < 0:
            raise SettingsError(f"{self.name}: container_concurrency must be 0 or more")

    def policy(self) -> ScalingPolicy:
        """The typed meaning of the annotations; raises SettingsError that names the function."""
        try:
            return ScalingPolicy.from_annotations(self.annotations)
        except SettingsError as error:
            raise SettingsError(f"{self.name}: {error.message}") from error
