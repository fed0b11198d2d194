"""Kustomize and Helm give the objects that `remoe deploy` applies, if those tools are here."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from knative.cluster.files import helm_values, write_kustomize
from knative.cluster.options import ClusterOptions
from knative.cluster.release import Release, render
from knative.deployment import DeploymentOptions, default_deployment

DEPLOY = Path(__file__).parents[2] / "deploy"
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
CHART = DEPLOY / "helm" / "remoe"
# Helm's own engine without its command: Helm's Go SDK in a wheel, in a process of its own.
_BY_LIBRARY = """
import sys, yaml, helm_python
chart, values, namespace = sys.argv[1:]
with open(values, encoding="utf-8") as text, helm_python.Chart.load(chart) as loaded:
    print(*loaded.render(yaml.safe_load(text), namespace=namespace).values(), sep="\\n---\\n")
"""
needs_helm = pytest.mark.skipif(
    not shutil.which("helm") and importlib.util.find_spec("helm_python") is None,
    reason="neither helm nor helm-python-sdk is installed",
)


@pytest.fixture
def release(tiny_model_dir: Path) -> Release:
    deployment = default_deployment(DeploymentOptions(model_dir=tiny_model_dir, threads=2))
    return render(deployment, ClusterOptions())


def by_name(objects: Any) -> dict[tuple[str, str], Any]:
    return {(one["kind"], one["metadata"]["name"]): one for one in objects if one}


def plain(release: Release) -> dict[tuple[str, str], Any]:
    return by_name(msgspec.to_builtins(release.objects))


def kustomized(folder: Path) -> dict[tuple[str, str], Any]:
    command = ["kubectl", "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert built.returncode == 0, built.stderr
    return by_name(yaml.safe_load_all(built.stdout))


def requests(service: Any) -> Any:
    return service["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]


@needs_kubectl
def test_the_kustomize_base_builds_to_the_release(release: Release, tmp_path: Path) -> None:
    write_kustomize(release, tmp_path)
    assert kustomized(tmp_path) == plain(release)


@needs_kubectl
def test_overlays_change_what_they_say(release: Release, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kustomize", tmp_path, dirs_exist_ok=True)
    write_kustomize(release, tmp_path / "base")
    small = kustomized(tmp_path / "overlays" / "small")
    gpu = kustomized(tmp_path / "overlays" / "gpu")
    for key, one in plain(release).items():
        if key[0] != "Service":
            assert small[key] == gpu[key] == one
            continue
        assert requests(small[key]) == {**requests(one), "cpu": "25m"}
        main = one["metadata"]["labels"]["app.kubernetes.io/component"] == "main"
        assert requests(gpu[key]).get("nvidia.com/gpu") == ("1" if main else None)


def test_the_charts_values_are_the_release(release: Release) -> None:
    values = yaml.safe_load(helm_values(release))
    assert by_name(values["objects"]) == plain(release)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values.keys() == defaults.keys()


def helm_template(values: Path, namespace: str) -> subprocess.CompletedProcess[str]:
    helm = shutil.which("helm")
    if helm is not None:
        given = ["remoe", str(CHART), "--values", str(values), "--namespace", namespace]
        command = [helm, "template", *given]
    else:
        command = [sys.executable, "-c", _BY_LIBRARY, str(CHART), str(values), namespace]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@needs_helm
def test_the_chart_renders_the_release_and_a_token(release: Release, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(helm_values(release), encoding="utf-8")
    built = helm_template(values, "remoe")
    assert built.returncode == 0, built.stderr
    rendered = by_name(yaml.safe_load_all(built.stdout))
    assert rendered.pop(("Secret", "remoe-expert-token"))["data"]["token"]
    assert rendered == plain(release)


@needs_helm
def test_the_chart_refuses_another_namespace(release: Release, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(helm_values(release), encoding="utf-8")
    built = helm_template(values, "elsewhere")
    assert built.returncode != 0
    assert 'these values are for namespace "remoe"' in built.stderr
