"""Who may do what in the namespace: service accounts, one small Role, and network policies.

On Knative no caller talks to a pod: calls go through the ingress's local gateway and, when a
function sleeps, through the activator, and enter a pod at its queue-proxy. A policy therefore
cannot tell the main function's calls from others by their source. It closes every other way in, so
that what is left passes the queue-proxy, and the expert functions ask for the token that only the
main function has (docs/knative.md, "Security").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from knative.cluster.options import ClusterOptions
from knative.manifest import PART_OF, Json, Object

__all__ = ["ACCOUNTS", "TOKEN_KEY", "TOKEN_SECRET", "security_objects"]

ACCOUNTS = {service: f"remoe-{service}" for service in ("gateway", "planner", "main", "expert")}
TOKEN_SECRET = "remoe-expert-token"  # noqa: S105  # the name of one
TOKEN_KEY = "token"  # noqa: S105
_REVISION_LABEL = "serving.knative.dev/service"
# queue-proxy: plain, HTTP/2 and TLS traffic, metrics for the autoscaler and for users.
_QUEUE_PORTS = (8012, 8013, 8112, 9090, 9091)
_DNS_PORTS: list[Json] = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]


def security_objects(
    options: ClusterOptions, functions: Mapping[str, Sequence[str]]
) -> list[Object]:
    """Accounts, Role and policies; `functions` are the Knative Services' names by service."""
    return [
        *(_account(name) for name in ACCOUNTS.values()),
        _object(
            "rbac.authorization.k8s.io/v1",
            "Role",
            "remoe-gateway",
            # The resident ledger: which pods are there, and since when.
            rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}],
        ),
        _object(
            "rbac.authorization.k8s.io/v1",
            "RoleBinding",
            "remoe-gateway",
            roleRef={
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": "remoe-gateway",
            },
            subjects=[
                {
                    "kind": "ServiceAccount",
                    "name": ACCOUNTS["gateway"],
                    "namespace": options.namespace,
                }
            ],
        ),
        *_policies(options, functions),
    ]


def _account(name: str) -> Object:
    mounts = name == ACCOUNTS["gateway"]  # nobody else talks to the API server
    return _object("v1", "ServiceAccount", name, automountServiceAccountToken=mounts)


def _policies(options: ClusterOptions, functions: Mapping[str, Sequence[str]]) -> list[Object]:
    everyone = [name for names in functions.values() for name in names]
    proxies: list[Json] = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
        for namespace in (options.serving_namespace, *options.ingress_namespaces)
    ]
    through_proxies: Json = {
        "from": proxies,
        "ports": [{"protocol": "TCP", "port": port} for port in _QUEUE_PORTS],
    }
    policies = [
        _object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            "remoe-through-queue-proxy",
            spec={
                "podSelector": _pods(everyone),
                "policyTypes": ["Ingress"],
                "ingress": [through_proxies],
            },
        )
    ]
    # A function that computes needs nobody; only a loader must reach the hub.
    if options.model().loader_source is None or not _from_hub(options):
        egress: list[Json] = []
    else:
        egress = [{"ports": [*_DNS_PORTS, {"protocol": "TCP", "port": 443}]}]
    policies.append(
        _object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            "remoe-experts-call-nobody",
            spec={
                "podSelector": _pods(functions["expert"]),
                "policyTypes": ["Egress"],
                "egress": egress,
            },
        )
    )
    return policies


def _from_hub(options: ClusterOptions) -> bool:
    return (options.model().loader_source or "").startswith("hub:")


def _pods(names: Sequence[str]) -> Json:
    expression = {"key": _REVISION_LABEL, "operator": "In", "values": sorted(names)}
    return {"matchExpressions": [expression]}


def _object(api_version: str, kind: str, name: str, **fields: Json) -> Object:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name, "labels": PART_OF},
        **fields,
    }
