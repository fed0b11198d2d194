"""Everything of one deployment on a cluster, as plain objects, and the digest that names it.

Services carry the digest of their own template: Knative makes a Revision whenever a template
changes, and a template that did not change is not sent again. What a Revision reads besides lies in
a ConfigMap named by its contents, so that an old Revision still finds its own; each service has one
with just what it reads, so that what concerns the others makes no Revision of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from knative.cluster.options import ClusterOptions
from knative.cluster.security import ACCOUNTS, TOKEN_KEY, TOKEN_SECRET, security_objects
from knative.deployment import Deployment
from knative.manifest import PART_OF, Json, Object, PodSettings, service_manifest
from knative.policy import AUTOSCALING
from knative.spec import FunctionSpec
from remoe.checkpoint import Checkpoint
from remoe.topology import Topology

__all__ = ["FILES", "HASH", "Release", "digest_of", "render"]

FILES = {**PART_OF, "app.kubernetes.io/component": "files"}
"""The labels of ConfigMaps that hold what services read."""

HASH = "remoe.dev/hash"
HOLDS = "remoe.dev/holds"
_FILES_DIR = "/etc/remoe"
_TOPOLOGY_FILE = "topology.json"
# Files of this machine by the variable that names them.
_FILES = {"REMOE_PLANNER_HARDWARE": "hardware.json", "REMOE_PRICES": "prices.json"}
_HISTORY_DIR = "/var/lib/remoe"
# A cold start through scheduler, container runtime and activator, besides what is loaded.
_COLD_START_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """`objects` in the order in which they are applied, Services last; none of them is secret."""

    namespace: str
    model: str
    objects: tuple[Object, ...]
    topology: Topology
    digest: str

    @property
    def services(self) -> tuple[Object, ...]:
        return tuple(one for one in self.objects if one["kind"] == "Service")


def digest_of(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]


def render(deployment: Deployment, options: ClusterOptions) -> Release:
    """The objects of a deployment; raises SettingsError for what a cluster would refuse."""
    model = options.model()
    checkpoint = Checkpoint.open(deployment.model_dir)
    urls = {
        spec.name: f"http://{spec.name}.{options.namespace}.svc.cluster.local"
        for spec in deployment.functions
    }
    topology = msgspec.structs.replace(
        deployment.topology(urls), model_dir=model.model_dir, model_digest=checkpoint.digest
    )
    functions = {
        "planner": [deployment.planner],
        "expert": list(deployment.experts),
        "main": [deployment.main],
        "gateway": [deployment.gateway],
    }
    files = {
        service: _files(topology, service, specs[0].env) for service, specs in functions.items()
    }
    services = _Services(
        deployment,
        options,
        checkpoint,
        {name: one["metadata"]["name"] for name, one in files.items()},
    )
    names = {service: [spec.name for spec in specs] for service, specs in functions.items()}
    objects = [*security_objects(options, names), *files.values()]
    objects += [services.of(spec, name) for name, specs in functions.items() for spec in specs]
    for one in objects:
        one["metadata"]["namespace"] = options.namespace
    return Release(
        namespace=options.namespace,
        model=deployment.model,
        objects=tuple(objects),
        topology=topology,
        digest=digest_of(objects),
    )


def _files(topology: Topology, service: str, env: Mapping[str, str]) -> Object:
    """What a service reads: its part of the topology, and files of this machine."""
    part = msgspec.json.encode(_part_of(topology, service))
    files = {_TOPOLOGY_FILE: msgspec.json.format(part, indent=2).decode() + "\n"}
    for variable, name in _FILES.items():
        path = Path(env.get(variable, ""))
        if path.is_file():
            files[name] = path.read_text(encoding="utf-8")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"remoe-{service}-{digest_of(files)[:8]}", "labels": FILES},
        "immutable": True,
        "data": files,
    }


def _part_of(topology: Topology, service: str) -> Topology:
    """The topology without what the service never looks at; sizes left out are 0."""
    if service == "expert":
        return msgspec.structs.replace(topology, main_memory_gb=0.0, experts=[])
    if service == "gateway":
        unsized = [msgspec.structs.replace(one, memory_gb=0.0) for one in topology.experts]
        return msgspec.structs.replace(topology, main_memory_gb=0.0, experts=unsized)
    return topology


class _Services:
    """Function by function: what the cluster adds to the description that all runtimes share."""

    def __init__(
        self,
        deployment: Deployment,
        options: ClusterOptions,
        checkpoint: Checkpoint,
        files: Mapping[str, str],
    ) -> None:
        self._deployment = deployment
        self._options = options
        self._checkpoint = checkpoint
        self._files = files
        self._weights = options.model()

    def of(self, spec: FunctionSpec, service: str) -> Object:
        pod = self._pod(spec, service)
        spec = self._adapted(spec, service)
        manifest: Object = service_manifest(spec, image=self._options.image(service), pod=pod)
        manifest["metadata"]["labels"]["app.kubernetes.io/component"] = service
        template = manifest["spec"]["template"]
        template["metadata"]["labels"] = {**PART_OF, "app.kubernetes.io/component": service}
        manifest["metadata"]["annotations"] = {HASH: digest_of(template), HOLDS: spec.holds}
        return manifest

    def _adapted(self, spec: FunctionSpec, service: str) -> FunctionSpec:
        """The function within the cluster's own limits, and with the operator's choices."""
        annotations = dict(spec.annotations)
        if not self._options.zero_initial_scale and spec.policy().initial_scale == 0:
            annotations[AUTOSCALING + "initial-scale"] = "1"
        if self._options.services_at_zero and service in {"gateway", "planner"}:
            annotations[AUTOSCALING + "min-scale"] = "0"
        if service == "expert":
            # The last pod goes with the window; nothing else keeps it.
            annotations.setdefault(AUTOSCALING + "scale-to-zero-pod-retention-period", "0s")
        return replace(
            spec,
            annotations=annotations,
            public=spec.public and self._options.public,
            timeout_s=min(self._timeout_s(spec, service), self._options.most_revision_timeout_s),
        )

    def _timeout_s(self, spec: FunctionSpec, service: str) -> int:
        """As long as the longest answer within the SLO may take, its cold start included."""
        slo = self._options.slo
        if slo is None or service not in {"gateway", "main"}:
            return spec.timeout_s
        answer_s = slo.ttft_s + slo.tpot_s * self._options.max_output_tokens
        return max(60, self._cold_start_s() + math.ceil(2 * answer_s))

    def _cold_start_s(self) -> int:
        return _COLD_START_S + self._options.start_up_s(self._read_bytes("main"))

    def _read_bytes(self, service: str) -> int:
        """What a function reads before it is ready: mapped experts are read when called."""
        if service == "main":
            experts = self._checkpoint.expert_count * self._checkpoint.expert_size_bytes
            return self._checkpoint.non_expert_size_bytes + experts
        return 0

    def _pod(self, spec: FunctionSpec, service: str) -> PodSettings:
        options, weights = self._options, self._weights
        files: Json = {"name": self._files[service]}
        volumes: list[Json] = [
            *weights.volumes,
            {"name": "files", "configMap": files},
            {"name": "tmp", "emptyDir": {}},
        ]
        mounts: list[Json] = [
            *weights.mounts,
            {"name": "files", "mountPath": _FILES_DIR, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # the pod's own
        ]
        env = {
            name: value
            for name, value in {
                "REMOE_TOPOLOGY": f"{_FILES_DIR}/{_TOPOLOGY_FILE}",
                "REMOE_PLANNER_HISTORY": self._model_file(spec, "REMOE_PLANNER_HISTORY"),
            }.items()
            if value is not None
        }
        for variable, name in _FILES.items():
            if Path(spec.env.get(variable, "")).is_file():
                env[variable] = f"{_FILES_DIR}/{name}"
        secret_env: dict[str, tuple[str, str]] = {}
        if service in {"main", "expert"}:
            secret_env["REMOE_EXPERT_TOKEN"] = (TOKEN_SECRET, TOKEN_KEY)
        if service == "main":
            env["REMOE_MAIN_CALL_TIMEOUT_S"] = str(_COLD_START_S)
        if service == "gateway":
            env["REMOE_GATEWAY_COLD_START_TIMEOUT_S"] = str(self._cold_start_s())
            if options.ledger_secret is None:
                env["REMOE_GATEWAY_AUTH"] = "off"
            else:
                env["REMOE_GATEWAY_AUTH"] = "required"
                secret_env["REMOE_GATEWAY_LEDGER"] = (options.ledger_secret, "url")
        if service == "planner" and options.history_claim is not None:
            claim: Json = {"claimName": options.history_claim}
            volumes.append({"name": "history", "persistentVolumeClaim": claim})
            mounts.append({"name": "history", "mountPath": _HISTORY_DIR})
            env["REMOE_PLANNER_HISTORY_DIR"] = _HISTORY_DIR
        starts_s = options.start_up_s(self._read_bytes(service))
        return PodSettings(
            env=env,
            secret_env=secret_env,
            volumes=volumes,
            mounts=mounts,
            init_containers=self._init_containers(service),
            service_account=ACCOUNTS[service],
            cpu_request=options.cpu_request,
            extended={options.gpu_resource: options.gpus}
            if service == "main" and options.gpus
            else {},
            start_up_s=starts_s,
            response_start_s=self._response_start_s(service),
            restricted=True,
        )

    def _init_containers(self, service: str) -> tuple[Json, ...]:
        # The main function's image has the libraries that a download needs.
        return self._weights.init_containers(
            self._options.image("main"), self._checkpoint.digest, memory_mib=512
        )

    def _response_start_s(self, service: str) -> int | None:
        slo = self._options.slo
        if slo is None or service not in {"gateway", "main"}:
            return None
        return self._cold_start_s() + math.ceil(2 * slo.ttft_s)

    def _model_file(self, spec: FunctionSpec, variable: str) -> str | None:
        """A file of the model's folder, where the pods have that folder."""
        path = spec.env.get(variable)
        folder = str(self._deployment.model_dir)
        if path is None or not path.startswith(folder + "/"):
            return None
        return self._weights.model_dir + path.removeprefix(folder)
