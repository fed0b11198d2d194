"""The Kubernetes API, as far as a deployment needs it; every object is plain data.

lightkube does the talking: kubeconfig, certificates, tokens, and the in-cluster account.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import httpx2
from lightkube import ApiError, Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.generic_resource import (
    create_global_resource,
    create_namespaced_resource,
)
from lightkube.types import CascadeType

from knative.manifest import Object
from remoe.errors import RemoeError, SettingsError, UnavailableError

__all__ = ["FIELD_MANAGER", "Cluster", "ClusterError", "ConflictError", "Object"]

FIELD_MANAGER = "remoe"
_TIMEOUT_S = 30.0
_RBAC = "rbac.authorization.k8s.io"
_KNATIVE = "serving.knative.dev"

# By apiVersion and kind: Knative's Service and the core's share a name.
_NAMESPACED = {
    ("v1", "ConfigMap"): "configmaps",
    ("v1", "Event"): "events",
    ("v1", "PersistentVolumeClaim"): "persistentvolumeclaims",
    ("v1", "Pod"): "pods",
    ("v1", "ResourceQuota"): "resourcequotas",
    ("v1", "Secret"): "secrets",
    ("v1", "ServiceAccount"): "serviceaccounts",
    ("networking.k8s.io/v1", "NetworkPolicy"): "networkpolicies",
    (f"{_RBAC}/v1", "Role"): "roles",
    (f"{_RBAC}/v1", "RoleBinding"): "rolebindings",
    (f"{_KNATIVE}/v1", "Revision"): "revisions",
    (f"{_KNATIVE}/v1", "Service"): "services",
}
_GLOBAL = {
    ("v1", "Namespace"): "namespaces",
    ("v1", "Node"): "nodes",
    ("authorization.k8s.io/v1", "SelfSubjectAccessReview"): "selfsubjectaccessreviews",
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): "customresourcedefinitions",
}


class ClusterError(RemoeError):
    """The cluster said no; the message is its own, with what was asked."""


class ConflictError(ClusterError):
    """Another field manager owns what this deployment would change."""


@cache  # lightkube registers each class once
def _resource(
    api_version: str, kind: str
) -> Any:  # namespaced or global: lightkube types its calls for either, not for both
    group, _, version = api_version.rpartition("/")
    key = api_version, kind
    if key in _NAMESPACED:
        return create_namespaced_resource(group, version, kind, _NAMESPACED[key])
    return create_global_resource(group, version, kind, _GLOBAL[key])


class Cluster:
    """One API server, as one user."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    def connect(cls, *, context: str | None = None) -> Self:
        """KUBECONFIG, ~/.kube/config, or the pod's own account; raises SettingsError."""
        try:
            config = KubeConfig.from_env().get(context_name=context)
            if config is None:
                raise SettingsError("the kubeconfig has no current context; choose one: --context")
            return cls(Client(config=config, timeout=httpx2.Timeout(_TIMEOUT_S)))
        except (ConfigError, OSError, KeyError) as error:
            raise SettingsError(
                f"no cluster to talk to ({error}). Set KUBECONFIG, or run where kubectl works"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def apply(self, one: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply, never by force; raises ConflictError with whose fields they are."""
        resource = _resource(one["apiVersion"], one["kind"])
        with _told(f"apply {_title(one)}"):
            return dict(
                self._client.apply(resource(one), field_manager=FIELD_MANAGER, dry_run=dry_run)
            )

    def create(self, one: Object) -> Object:
        with _told(f"create {_title(one)}"):
            return dict(self._client.create(_resource(one["apiVersion"], one["kind"])(one)))

    def get(
        self, api_version: str, kind: str, name: str, namespace: str | None = None
    ) -> Object | None:
        """None if it does not exist."""
        with _told(f"read {kind} {name}"):
            try:
                return dict(
                    self._client.get(_resource(api_version, kind), name, namespace=namespace)
                )
            except ApiError as error:
                if error.status.code == httpx2.codes.NOT_FOUND:
                    return None
                raise

    def list(
        self,
        api_version: str,
        kind: str,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[Object]:
        with _told(f"list {kind}s"):
            found = self._client.list(
                _resource(api_version, kind), namespace=namespace, labels=dict(labels or {})
            )
            known = {"apiVersion": api_version, "kind": kind}
            return [{**known, **one} for one in found]

    def need_namespace(self, name: str, *, create: bool, dry_run: bool = False) -> None:
        """Raise SettingsError if it is missing and shall not be made."""
        if self.get("v1", "Namespace", name) is not None:
            return
        if not create or dry_run:
            raise SettingsError(
                f"there is no namespace {name}: make it with --create-namespace (without "
                f"--dry-run) or `kubectl create namespace {name}`"
            )
        labels = {"pod-security.kubernetes.io/warn": "restricted"}
        metadata = {"name": name, "labels": labels}
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})

    def delete(self, one: Object) -> bool:
        """False if it was gone already."""
        resource = _resource(one["apiVersion"], one["kind"])
        with _told(f"delete {_title(one)}"):
            try:
                self._client.delete(
                    resource,
                    one["metadata"]["name"],
                    namespace=one["metadata"].get("namespace"),
                    cascade=CascadeType.FOREGROUND,
                )
            except ApiError as error:
                if error.status.code != httpx2.codes.NOT_FOUND:
                    raise
                return False
            return True


def _title(one: Object) -> str:
    return f"{one['kind']} {one['metadata'].get('name', '')}".strip()


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """The cluster's errors as ours, with what was being done."""
    try:
        yield
    except ApiError as error:
        status = error.status
        message = f"cannot {doing}: {status.message or status.reason}"
        if status.code == httpx2.codes.CONFLICT:
            raise ConflictError(message) from error
        raise ClusterError(message) from error
    except httpx2.HTTPError as error:
        raise UnavailableError(
            f"cannot {doing}: the API server does not answer ({error}). Check KUBECONFIG and that "
            "the cluster runs"
        ) from error
