"""A release as files: YAML, a Kustomize base, and values for the Helm chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml

from knative.cluster.release import Release
from knative.manifest import Object

__all__ = ["helm_values", "write_kustomize", "yaml_text"]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # the library is untyped
    """Without anchors: manifests are read by people, and by tools that know none."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(value: object) -> str:
    plain = msgspec.to_builtins(value)
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=100))


def yaml_text(objects: Sequence[Object]) -> str:
    return "---\n".join(_text(one) for one in objects)


def write_kustomize(release: Release, folder: Path) -> list[Path]:
    """One file for each kind, and kustomization.yaml; overlays patch them by kind and name."""
    folder.mkdir(parents=True, exist_ok=True)
    by_kind: dict[str, list[Object]] = {}
    for one in release.objects:
        by_kind.setdefault(str(one["kind"]).lower(), []).append(one)
    written = []
    for kind, objects in by_kind.items():
        path = folder / f"{kind}.yaml"
        path.write_text(yaml_text(objects), encoding="utf-8")
        written.append(path)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": release.namespace,
        "resources": [path.name for path in written],
    }
    path = folder / "kustomization.yaml"
    path.write_text(_text(kustomization), encoding="utf-8")
    return [*written, path]


def helm_values(release: Release) -> str:
    """What the chart deploy/helm/remoe needs to render this very release."""
    return _text({"namespace": release.namespace, "objects": release.objects})
