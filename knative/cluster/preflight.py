"""What a cluster lacks for a deployment, each with the command that mends it.

A missing CustomResourceDefinition, flag or permission otherwise shows as a webhook's refusal or as
a function that never gets ready; here all of them are named at once, before anything is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from knative.cluster.api import Cluster, ClusterError
from knative.cluster.release import Release
from knative.manifest import Object
from knative.policy import AUTOSCALING
from remoe.quantities import parse_quantity

__all__ = ["Finding", "Needs", "check"]

_GIB = 1 << 30
_SERVING = "knative-serving"
_MANAGED = (
    ("serving.knative.dev", "services", ("get", "list", "create", "patch", "delete")),
    ("", "configmaps", ("get", "list", "create", "patch", "delete")),
    ("", "secrets", ("get", "list", "create", "delete")),
    ("", "serviceaccounts", ("get", "list", "create", "patch", "delete")),
    ("", "pods", ("list", "watch")),  # watch: nobody may grant what they lack
    ("networking.k8s.io", "networkpolicies", ("get", "list", "create", "patch", "delete")),
    ("rbac.authorization.k8s.io", "roles", ("get", "list", "create", "patch", "delete")),
    ("rbac.authorization.k8s.io", "rolebindings", ("get", "list", "create", "patch", "delete")),
)
# Knative's own defaults, where its ConfigMap has only the example.
_ON = {"enabled", "allowed"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`ok` is None for what is worth knowing and stops nothing, or could not be looked at."""

    ok: bool | None
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """`flags` are keys of config-features, `claims` names of claims that must exist."""

    release: Release
    flags: tuple[str, ...] = ()
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    claims: tuple[str, ...] = ()


def check(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Look at everything; what may not be read is a note that says so."""
    installed = _tried(_installed(cluster))
    yield from installed
    if any(finding.ok is False for finding in installed):
        return
    for checks in (
        _ingress(cluster),
        _features(cluster, needs),
        _autoscaler(cluster, needs),
        _timeouts(cluster, needs),
        _permissions(cluster, needs),
        _namespace(cluster, needs),
        _claims(cluster, needs),
        _room(cluster, needs),
        _quota(cluster, needs),
    ):
        yield from _tried(checks)


def _tried(findings: Iterator[Finding]) -> list[Finding]:
    made = []
    try:
        for finding in findings:
            made.append(finding)  # noqa: PERF402  # what was found before an error counts
    except ClusterError as error:
        made.append(Finding(None, f"could not be checked: {error.message}"))
    return made


def _installed(cluster: Cluster) -> Iterator[Finding]:
    kind = "CustomResourceDefinition"
    found = cluster.get("apiextensions.k8s.io/v1", kind, "services.serving.knative.dev")
    if found is None:
        yield Finding(
            False,
            "Knative Serving is not installed",
            "install Knative Serving 1.23 (serving-crds.yaml, then serving-core.yaml)",
        )
        return
    labels = found["metadata"].get("labels", {})
    version = labels.get("app.kubernetes.io/version", "of unknown version")
    yield Finding(True, f"Knative Serving {version}")


def _config(cluster: Cluster, name: str) -> dict[str, str]:
    found = cluster.get("v1", "ConfigMap", name, _SERVING) or {}
    data: dict[str, str] = found.get("data") or {}
    return data


def _patch(name: str, **data: str) -> str:
    pairs = ",".join(f'"{key}":"{value}"' for key, value in data.items())
    return (
        f"kubectl patch configmap {name} --namespace {_SERVING} --type merge "
        f"--patch '{{\"data\":{{{pairs}}}}}'"
    )


def _ingress(cluster: Cluster) -> Iterator[Finding]:
    chosen = _config(cluster, "config-network").get("ingress-class", "")
    if chosen:
        yield Finding(True, f"ingress: {chosen}")
        return
    yield Finding(
        False,
        "no ingress is chosen: Knative would wait for Istio",
        _patch("config-network", **{"ingress-class": "kourier.ingress.networking.knative.dev"}),
    )


def _features(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    features = _config(cluster, "config-features")
    for flag in needs.flags:
        ok = features.get(flag, "disabled").lower() in _ON
        yield Finding(ok, f"feature {flag}", _patch("config-features", **{flag: "enabled"}))


def _autoscaler(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    config = _config(cluster, "config-autoscaler")
    if config.get("enable-scale-to-zero", "true") != "true":
        fix = _patch("config-autoscaler", **{"enable-scale-to-zero": "true"})
        yield Finding(False, "functions may not scale to zero", fix)
    wanted = any(
        _template(one)["metadata"]["annotations"].get(AUTOSCALING + "initial-scale") == "0"
        for one in needs.release.services
    )
    if wanted:
        yield Finding(
            config.get("allow-zero-initial-scale", "false") == "true",
            "expert functions may be made without starting them",
            _patch("config-autoscaler", **{"allow-zero-initial-scale": "true"})
            + "  (or deploy with --no-initial-zero)",
        )


def _timeouts(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    most = int(_config(cluster, "config-defaults").get("max-revision-timeout-seconds", "600"))
    longest = max(_template(one)["spec"]["timeoutSeconds"] for one in needs.release.services)
    fix = _patch("config-defaults", **{"max-revision-timeout-seconds": str(longest)})
    yield Finding(
        longest <= most, f"requests may take {longest} s (the cluster allows {most} s)", fix
    )


def _permissions(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    lacking = []
    for group, resource, verbs in _MANAGED:
        denied = [verb for verb in verbs if not _may(cluster, needs, group, resource, verb)]
        if denied:
            lacking.append((group, resource, denied))
    namespace = needs.release.namespace
    if not lacking:
        yield Finding(True, f"you may do in namespace {namespace} what deploying takes")
    for group, resource, denied in lacking:
        name = f"{resource}.{group}" if group else resource
        told = ",".join(denied)
        yield Finding(
            False,
            f"you may not {told} {name} in namespace {namespace}",
            f"kubectl create role remoe-deploy-{resource} --namespace {namespace} --verb={told} "
            f"--resource={name}, and bind it to yourself with kubectl create rolebinding",
        )


def _may(cluster: Cluster, needs: Needs, group: str, resource: str, verb: str) -> bool:
    review = cluster.create(
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "metadata": {},
            "spec": {
                "resourceAttributes": {
                    "namespace": needs.release.namespace,
                    "group": group,
                    "resource": resource,
                    "verb": verb,
                }
            },
        }
    )
    return bool(review.get("status", {}).get("allowed"))


def _namespace(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    name = needs.release.namespace
    found = cluster.get("v1", "Namespace", name)
    if found is None:
        yield Finding(False, f"there is no namespace {name}", "deploy with --create-namespace")
        return
    yield Finding(True, f"namespace {name}")
    enforced = found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
    host_path = any(
        "hostPath" in volume
        for one in needs.release.services
        for volume in _template(one)["spec"].get("volumes", [])
    )
    if enforced in {"baseline", "restricted"} and host_path:
        yield Finding(
            False,
            f"pods with a node's folder (node:/path) are refused: {name} enforces {enforced}",
            "use --weights claim:NAME, for example on a local PersistentVolume, or "
            f"kubectl label namespace {name} pod-security.kubernetes.io/enforce=privileged "
            "--overwrite",
        )


def _claims(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    namespace = needs.release.namespace
    for name in needs.claims:
        found = cluster.get("v1", "PersistentVolumeClaim", name, namespace)
        if found is None:
            yield Finding(
                False,
                f"there is no claim {name} in namespace {namespace}",
                "make it, and put the model on it (docs/knative.md, Weights)",
            )
            continue
        modes = found["spec"].get("accessModes", [])
        shared = {"ReadOnlyMany", "ReadWriteMany"} & set(modes)
        phase = found.get("status", {}).get("phase", "")
        ok = None if phase == "Bound" and not shared else phase in {"Bound", ""}
        note = "" if shared else " (pods of one node only: its access mode is not ...Many)"
        yield Finding(
            ok,
            f"claim {name}: {phase or 'state unknown'}{note}",
            "" if shared else "with more than one node, use a claim that is ReadOnlyMany",
        )


def _room(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    nodes = cluster.list("v1", "Node")
    free = [node.get("status", {}).get("allocatable", {}) for node in nodes]
    if needs.gpus:
        most = max((parse_quantity(node.get(needs.gpu_resource, "0")) for node in free), default=0)
        yield Finding(
            most >= needs.gpus,
            f"a node with {needs.gpus} {needs.gpu_resource} (the most is {most:.0f})",
            "add such a node, and its vendor's device plugin",
        )
    largest = max(needs.release.services, key=lambda one: _requests(one)[0])
    memory_bytes, cores = _requests(largest)
    fits = any(
        parse_quantity(node.get("memory", "0")) >= memory_bytes
        and parse_quantity(node.get("cpu", "0")) >= cores
        for node in free
    )
    yield Finding(
        fits,
        f"a node for {largest['metadata']['name']}: {memory_bytes / _GIB:.1f} GiB, {cores:g} cores",
        "add a larger node, or ask for less: --threads, --cpu-request",
    )


def _quota(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    quotas = cluster.list("v1", "ResourceQuota", needs.release.namespace)
    total_bytes = sum(_requests(one)[0] for one in needs.release.services)
    total_cores = sum(_requests(one)[1] for one in needs.release.services)
    for quota in quotas:
        status = quota.get("status", {})
        hard, used = status.get("hard", {}), status.get("used", {})
        for key, needed in (("requests.memory", total_bytes), ("requests.cpu", total_cores)):
            if key in hard:
                left = parse_quantity(hard[key]) - parse_quantity(used.get(key, "0"))
                yield Finding(
                    True if left >= needed else None,
                    f"quota {quota['metadata']['name']}: {key} {left:g} left, {needed:g} with all "
                    "functions awake",
                    f"raise {key} of the quota, or some functions cannot wake together",
                )


def _template(service: Object) -> Object:
    template: Object = service["spec"]["template"]
    return template


def _requests(service: Object) -> tuple[float, float]:
    """Bytes and cores that one pod asks for."""
    asked = _template(service)["spec"]["containers"][0]["resources"]["requests"]
    return parse_quantity(asked["memory"]), parse_quantity(asked["cpu"])
