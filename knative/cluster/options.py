"""What a cluster needs to be told of a deployment, besides what every runtime is told."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from knative.cluster.weights import Weights, parse_weights
from remoe.errors import SettingsError
from remoe.plan import Slo

__all__ = ["ClusterOptions", "Service"]

Service = str  # gateway, planner, main or expert
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """`images` is a name with `{service}` in it; digests are safer than tags outside of tests.

    `cpu_request` in cores, for each pod, lets a small cluster hold more than it could run at full
    speed; the limits stay. `ledger_secret` names a Secret whose key `url` is a database URL; with
    it the gateway asks for API keys. `history_claim` is a claim that the planner may write to.
    `max_output_tokens` is the longest answer to allow time for. `zero_initial_scale` says whether
    the cluster lets a Revision begin without a pod.
    """

    namespace: str = "remoe"
    images: str = "kind.local/remoe-{service}:v1"
    weights: str = "claim:remoe-models"
    cached_from: str | None = None
    slo: Slo | None = None
    max_output_tokens: int = 512
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    cpu_request: float | None = None
    public: bool = False
    ledger_secret: str | None = None
    history_claim: str | None = None
    zero_initial_scale: bool = True
    services_at_zero: bool = False
    serving_namespace: str = "knative-serving"
    ingress_namespaces: tuple[str, ...] = ("kourier-system",)
    most_revision_timeout_s: int = 600
    load_mb_per_s: float = field(default=50.0)
    """How fast weights are read at the least: what a start-up probe's patience is made of."""

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise SettingsError(f"namespace {self.namespace!r}: use lower-case letters and digits")
        if "{service}" not in self.images:
            raise SettingsError(f"images {self.images!r}: write {{service}} where its name belongs")
        if self.gpus < 0:
            raise SettingsError(f"gpus is {self.gpus}; it must be 0 or more")
        if self.public and self.ledger_secret is None:
            raise SettingsError(
                "a public gateway needs API keys, which live in the ledger: name a Secret whose "
                "key `url` is a database URL with --ledger-secret, or leave the gateway inside "
                "the cluster"
            )
        self.model()

    def model(self) -> Weights:
        return parse_weights(self.weights, cached_from=self.cached_from)

    @property
    def flags(self) -> tuple[str, ...]:
        """The settings of Knative's config-features that this deployment needs."""
        flags = list(self.model().flags)
        if self.history_claim is not None:
            flags += [
                "kubernetes.podspec-persistent-volume-claim",
                "kubernetes.podspec-persistent-volume-write",
            ]
        return tuple(dict.fromkeys(flags))

    def image(self, service: Service) -> str:
        return self.images.replace("{service}", service)

    def start_up_s(self, read_bytes: int) -> int:
        """How long a function that reads so much may take to start, with a minute for the rest."""
        return 60 + math.ceil(read_bytes / 1e6 / self.load_mb_per_s)
