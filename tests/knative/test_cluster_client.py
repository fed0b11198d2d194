"""Deploying against an API server: what is sent, what is left alone, and what is told."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightkube import Client
from lightkube.config import models
from lightkube.config.kubeconfig import KubeConfig
from typer.testing import CliRunner

from knative.cluster.api import FIELD_MANAGER, Cluster, ClusterError, ConflictError
from knative.cluster.deploying import (
    Applied,
    apply_release,
    destroy,
    not_ready,
    wait_gone,
    wait_ready,
)
from knative.cluster.diff import field_changes, release_changes
from knative.cluster.options import ClusterOptions
from knative.cluster.preflight import Finding, Needs, check
from knative.cluster.release import Release, render
from knative.cluster.releases import Expectation, kept_releases, release_before
from knative.cluster.status import namespace_status
from knative.deployment import DeploymentOptions, default_deployment
from remoe.cli import app
from remoe.errors import NotFoundError, SettingsError, UnavailableError
from tests.knative.fake_api import FakeApi

NAMESPACE = "remoe"
SERVICES = f"/apis/serving.knative.dev/v1/namespaces/{NAMESPACE}/services"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
CONFIG = "/api/v1/namespaces/knative-serving/configmaps"


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


@pytest.fixture
def cluster(api: FakeApi) -> Iterator[Cluster]:
    with connected(api.url) as cluster:
        yield cluster


def connected(url: str) -> Cluster:
    server, user = models.Cluster(server=url), models.User()
    return Cluster(Client(config=KubeConfig.from_one(cluster=server, user=user).get()))


def released(model_dir: Path, window: str = "60s", layers: int = 2, **options: Any) -> Release:
    deployment = default_deployment(
        DeploymentOptions(model_dir=model_dir, threads=2, layers_per_function=layers, window=window)
    )
    return render(deployment, ClusterOptions(**options))


def applied(cluster: Cluster, release: Release, **options: Any) -> list[Applied]:
    return list(apply_release(cluster, release.objects, namespace=NAMESPACE, **options))


def outcomes(results: list[Applied]) -> set[str]:
    return {one.outcome for one in results}


def test_everything_is_created_by_one_field_manager(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    results = applied(cluster, released(tiny_model_dir))
    assert outcomes(results) == {"created"}
    patches = [query for method, _, query in api.requests if method == "PATCH"]
    assert {query["fieldManager"] for query in patches} == {FIELD_MANAGER}
    assert all(query.get("force", "false") == "false" for query in patches)


def test_applying_again_changes_nothing_and_sends_no_service(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    release = released(tiny_model_dir)
    applied(cluster, release)
    before = copy.deepcopy(api.objects)
    api.requests.clear()
    assert outcomes(applied(cluster, release)) == {"unchanged"}
    assert api.objects == before
    assert not [path for method, path, _ in api.requests if method == "PATCH" and SERVICES in path]


def test_only_what_differs_gets_a_new_generation(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    applied(cluster, released(tiny_model_dir))
    results = applied(cluster, released(tiny_model_dir, window="30s"))
    changed = {one.name for one in results if one.kind == "Service" and one.outcome == "changed"}
    assert changed == {
        name for path, name in api.objects if path == SERVICES and "-experts-" in name
    }
    for (path, name), one in api.objects.items():
        if path == SERVICES:
            assert one["metadata"]["generation"] == (2 if name in changed else 1)


def test_functions_that_are_no_more_go_after_the_new_ones_are_there(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    applied(cluster, released(tiny_model_dir, layers=2))
    results = applied(cluster, released(tiny_model_dir, layers=3))
    removed = [one.name for one in results if one.outcome == "removed"]
    assert [re.sub(".*-experts", "", name) for name in removed] == ["-l00-l01", "-l02-l02"]
    assert results[-1].outcome == "removed"
    assert {name for path, name in api.objects if path == SERVICES}.isdisjoint(removed)


def test_another_managers_field_is_told_and_never_taken(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    release = released(tiny_model_dir)
    applied(cluster, release)
    place = ("spec", "template", "spec", "timeoutSeconds")
    gateway = api.objects[SERVICES, "gateway"]
    gateway["spec"]["template"]["spec"]["timeoutSeconds"] = 30
    api.owners[SERVICES, "gateway"][place] = "kubectl-edit"
    with pytest.raises(ConflictError, match=r'conflict with "kubectl-edit".*timeoutSeconds'):
        applied(cluster, release)
    assert api.objects[SERVICES, "gateway"]["spec"]["template"]["spec"]["timeoutSeconds"] == 30


def test_a_dry_run_asks_the_server_and_keeps_nothing(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    assert outcomes(applied(cluster, released(tiny_model_dir), dry_run=True)) == {"created"}
    assert not api.objects
    assert {query.get("dryRun") for method, _, query in api.requests if method == "PATCH"} == {
        "All"
    }
    assert api.count("POST") == 0


def test_the_token_is_made_once_and_is_no_part_of_the_release(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    applied(cluster, released(tiny_model_dir))
    secrets = f"/api/v1/namespaces/{NAMESPACE}/secrets"
    before = copy.deepcopy(api.objects[secrets, "remoe-expert-token"])
    assert len(before["data"]["token"]) > 40
    applied(cluster, released(tiny_model_dir, window="30s"))
    assert api.objects[secrets, "remoe-expert-token"] == before


def test_rollback_finds_the_release_before(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    expected = Expectation(prompt_tokens=1, output_tokens=2, ttft_s=0.5, tpot_s=0.1, cost_usd=1e-4)
    first = released(tiny_model_dir)
    applied(cluster, first, expectation=expected)
    with pytest.raises(NotFoundError, match="kept are 1"):
        release_before(cluster, NAMESPACE)
    services = {
        key: copy.deepcopy(one["spec"]) for key, one in api.objects.items() if key[0] == SERVICES
    }
    applied(cluster, released(tiny_model_dir, window="30s"))
    back = release_before(cluster, NAMESPACE)
    assert (back.number, back.expectation) == (1, expected)
    list(apply_release(cluster, back.objects, namespace=NAMESPACE))
    assert {key: one["spec"] for key, one in api.objects.items() if key[0] == SERVICES} == services
    assert [one.number for one in kept_releases(cluster, NAMESPACE)] == [1, 2, 3]
    assert not list(release_changes(cluster, first.objects, namespace=NAMESPACE))


def test_only_the_latest_ten_releases_are_kept(cluster: Cluster, tiny_model_dir: Path) -> None:
    for window in range(6, 18):
        applied(cluster, released(tiny_model_dir, window=f"{window}s"))
    assert [one.number for one in kept_releases(cluster, NAMESPACE)] == list(range(3, 13))


def test_files_that_no_kept_release_reads_are_forgotten(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    def files() -> set[str]:
        path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
        names = {name for where, name in api.objects if where == path}
        return {name for name in names if not name.startswith("remoe-release-")}

    first = released(tiny_model_dir, layers=1)
    applied(cluster, first)
    before = files()
    assert len(before) == 4
    for window in range(6, 16):
        applied(cluster, released(tiny_model_dir, window=f"{window}s"))
        assert (before <= files()) == (window < 15)
    assert len(files()) == 4


def test_a_diff_names_each_field(cluster: Cluster, tiny_model_dir: Path) -> None:
    release = released(tiny_model_dir)
    assert {
        change.after for change in release_changes(cluster, release.objects, namespace=NAMESPACE)
    } == {"created"}
    applied(cluster, release)
    changes = [
        change
        for change in release_changes(
            cluster, released(tiny_model_dir, window="30s").objects, namespace=NAMESPACE
        )
        if "hash" not in change.path
    ]
    assert {(change.path, change.before, change.after) for change in changes} == {
        (
            "spec.template.metadata.annotations.autoscaling.knative.dev/window",
            '"60s"',
            '"30s"',
        )
    }


def test_what_the_cluster_adds_is_no_change_and_what_goes_from_a_list_is() -> None:
    now = {"a": 1, "added": 2, "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]}
    wanted = {"a": 1, "env": [{"name": "X", "value": "3"}], "empty": {}}
    assert list(field_changes(now, wanted)) == [
        ("env[X].value", '"1"', '"3"'),
        ("env[Y]", '{"name":"Y","value":"2"}', None),
    ]


def ready(one: dict[str, Any], status: str, reason: str = "", message: str = "") -> None:
    condition = {"type": "Ready", "status": status, "reason": reason, "message": message}
    one["status"] = {
        "observedGeneration": one["metadata"]["generation"],
        "conditions": [condition],
        "url": "http://x",
        "address": {"url": "http://x.svc"},
    }


def test_waiting_ends_with_readiness_with_failure_or_with_time(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    release = released(tiny_model_dir)
    applied(cluster, release)
    names = [one["metadata"]["name"] for one in release.services]
    services = [one for key, one in api.objects.items() if key[0] == SERVICES]
    now = 0.0

    def sleep(_: float) -> None:
        nonlocal now
        now += 1
        for one in services[: int(now)]:
            ready(one, "True")

    seen: list[str] = []
    wait_ready(
        cluster,
        names,
        NAMESPACE,
        timeout_s=60,
        on_ready=lambda name, _: seen.append(name),
        clock=lambda: now,
        sleep=sleep,
    )
    assert sorted(seen) == sorted(names)

    ready(services[0], "False", "RevisionFailed", "image not found")
    with pytest.raises(ClusterError, match="RevisionFailed: image not found"):
        wait_ready(cluster, names, NAMESPACE, timeout_s=60)
    ready(services[0], "Unknown", "Deploying", "pulling")
    clock = map(float, range(100)).__next__
    with pytest.raises(ClusterError, match=r"not ready after 3 s: .*Deploying: pulling"):
        wait_ready(cluster, names, NAMESPACE, timeout_s=3, clock=clock, sleep=lambda _: None)


def test_an_old_status_is_not_this_generations() -> None:
    service: dict[str, Any] = {"metadata": {"name": "s", "generation": 1}}
    ready(service, "True")
    assert not_ready(service) is None
    service["metadata"]["generation"] = 2
    assert not_ready(service) == "waits for Knative to look at it"


def test_destroy_leaves_what_it_did_not_make(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    claims = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
    api.put(claims, {"metadata": {"name": "models"}})
    api.put(SERVICES, {"metadata": {"name": "somebodys"}})
    applied(cluster, released(tiny_model_dir))
    assert outcomes(list(destroy(cluster, NAMESPACE))) == {"removed"}
    assert set(api.objects) == {(claims, "models"), (SERVICES, "somebodys")}
    wait_gone(cluster, NAMESPACE, timeout_s=0)
    assert not list(destroy(cluster, NAMESPACE))


def pod(name: str, service: str, *, running: bool = True, **metadata: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "remoe", "serving.knative.dev/service": service}
    return {
        "metadata": {"name": name, "labels": labels, **metadata},
        "status": {
            "conditions": [
                {
                    "type": "Ready",
                    "status": str(running),
                    "lastTransitionTime": "2026-11-23T12:00:03Z",
                }
            ],
            "containerStatuses": [
                {"restartCount": 1, "lastState": {"terminated": {"reason": "OOMKilled"}}}
            ],
        },
    }


def test_status_is_the_local_runtimes_table(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    with pytest.raises(NotFoundError, match="remoe deploy"):
        namespace_status(cluster, NAMESPACE)
    release = released(tiny_model_dir)
    applied(cluster, release)
    for key, one in api.objects.items():
        if key[0] == SERVICES:
            ready(one, "True")
    expert = release.services[1]["metadata"]["name"]
    api.put(PODS, pod("e-1", expert))
    api.put(PODS, pod("e-2", expert, running=False))
    api.put(PODS, pod("g-1", "gateway", deletionTimestamp="2026-11-23T12:00:09Z"))
    status = namespace_status(cluster, NAMESPACE)
    functions = {one.name: one for one in status.functions}
    assert [one.name for one in status.functions][:3] == [
        "gateway",
        "planner",
        release.services[-2]["metadata"]["name"],
    ]
    assert (functions[expert].state, functions[expert].ready, functions[expert].desired) == (
        "ready",
        1,
        2,
    )
    assert functions[expert].cold_start_last_ms == 3000
    assert functions[expert].memory_kills == 2
    assert functions[expert].holds.startswith("layers")
    assert functions[expert].memory_limit_bytes > 96 << 20
    assert functions["gateway"].state == "draining"
    assert functions["planner"].state == "zero"
    ready(api.objects[SERVICES, "planner"], "False", "Broken", "no image")
    (planner,) = (
        one for one in namespace_status(cluster, NAMESPACE).functions if one.name == "planner"
    )
    assert (planner.state, planner.detail) == ("backing off", "planner failed: Broken: no image")


# Preflight


def complete(api: FakeApi) -> None:
    """A cluster that has everything."""
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    labels = {"app.kubernetes.io/version": "1.23.0"}
    api.put(crds, {"metadata": {"name": "services.serving.knative.dev", "labels": labels}})
    features = {
        f"kubernetes.podspec-{name}": "enabled"
        for name in ("persistent-volume-claim", "init-containers", "volumes-hostpath")
    }
    for name, data in (
        ("config-features", features),
        ("config-network", {"ingress-class": "kourier.ingress.networking.knative.dev"}),
        ("config-autoscaler", {"allow-zero-initial-scale": "true"}),
        ("config-defaults", {}),
    ):
        api.put(CONFIG, {"metadata": {"name": name}, "data": data})
    api.put("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": {}}})
    allocatable = {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    api.put("/api/v1/nodes", {"metadata": {"name": "n"}, "status": {"allocatable": allocatable}})
    claim = {"spec": {"accessModes": ["ReadOnlyMany"]}, "status": {"phase": "Bound"}}
    claims = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
    api.put(claims, {"metadata": {"name": "models"}, **claim})


def needs(model_dir: Path, **options: Any) -> Needs:
    given = {"weights": "claim:models", "gpus": 1, **options}
    cluster_options = ClusterOptions(**given)
    deployment = default_deployment(DeploymentOptions(model_dir=model_dir, threads=2))
    return Needs(
        release=render(deployment, cluster_options),
        flags=cluster_options.flags,
        gpus=cluster_options.gpus,
        claims=("models",),
    )


def lacking(cluster: Cluster, wanted: Needs) -> list[Finding]:
    return [finding for finding in check(cluster, wanted) if finding.ok is not True]


def test_a_complete_cluster_lacks_nothing(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    complete(api)
    assert lacking(cluster, needs(tiny_model_dir)) == []


def test_each_missing_thing_is_named_with_its_patch(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    complete(api)
    for name in ("config-features", "config-network", "config-autoscaler"):
        api.objects[CONFIG, name]["data"] = {}
    del api.objects["/api/v1/nodes", "n"]["status"]["allocatable"]["nvidia.com/gpu"]
    claims = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
    del api.objects[claims, "models"]
    found = lacking(cluster, needs(tiny_model_dir))
    assert all(finding.ok is False for finding in found)
    fixes = {finding.what: finding.fix for finding in found}
    assert (
        "kubectl patch configmap config-features --namespace knative-serving --type merge --patch "
        '\'{"data":{"kubernetes.podspec-persistent-volume-claim":"enabled"}}\''
        in fixes["feature kubernetes.podspec-persistent-volume-claim"]
    )
    told = "\n".join([*fixes, *fixes.values()])
    for word in ("kourier", "allow-zero-initial-scale", "nvidia.com/gpu", "no claim models"):
        assert word in told


def test_without_knative_nothing_else_is_asked(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    (finding,) = check(cluster, needs(tiny_model_dir))
    assert (finding.ok, finding.what) == (False, "Knative Serving is not installed")


def test_missing_permissions_are_named_by_verb(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    complete(api)
    api.denied = {("services", "patch"), ("services", "delete"), ("secrets", "create")}
    told = [finding.what for finding in lacking(cluster, needs(tiny_model_dir))]
    assert told == [
        "you may not patch,delete services.serving.knative.dev in namespace remoe",
        "you may not create secrets in namespace remoe",
    ]


def test_a_nodes_folder_and_the_restricted_standard_do_not_go_together(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    complete(api)
    namespace = api.objects["/api/v1/namespaces", NAMESPACE]
    namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    assert lacking(cluster, needs(tiny_model_dir)) == []
    (finding,) = lacking(cluster, needs(tiny_model_dir, weights="node:/var/models/m"))
    assert "enforces restricted" in finding.what


def test_a_quota_that_is_too_small_is_noted(
    api: FakeApi, cluster: Cluster, tiny_model_dir: Path
) -> None:
    complete(api)
    status = {"hard": {"requests.memory": "2Gi"}, "used": {"requests.memory": "1Gi"}}
    quotas = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas"
    api.put(quotas, {"metadata": {"name": "small"}, "status": status})
    (finding,) = lacking(cluster, needs(tiny_model_dir))
    assert finding.ok is None
    assert "quota small" in finding.what


# The commands


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: fake\n"
        f"clusters: [{{name: fake, cluster: {{server: '{api.url}'}}}}]\n"
        "users: [{name: me, user: {}}]\n"
        "contexts: [{name: fake, context: {cluster: fake, user: me}}]\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("REMOE_HOME", str(tmp_path / "home"))
    return path


@pytest.mark.usefixtures("kubeconfig")
def test_the_commands_from_nothing_to_nothing(api: FakeApi, tiny_model_dir: Path) -> None:
    run = CliRunner()

    def remoe(*arguments: str, code: int = 0) -> str:
        result = run.invoke(app, list(arguments), env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    deployment = ("deploy", str(tiny_model_dir), "--weights", "claim:models")
    assert "remoe deploy" in remoe("status", "--namespace", NAMESPACE, code=1)
    assert "no namespace" in remoe(*deployment, "--timeout", "0", code=1)
    assert "created" in remoe(*deployment, "--timeout", "0", "--create-namespace")
    assert "Nothing would change" in remoe("diff", *deployment[1:], "--exit-code")
    shorter = (*deployment[1:], "--window", "30s")
    assert "autoscaling.knative.dev/window" in remoe("diff", *shorter, "--exit-code", code=1)
    assert "changed" in remoe("deploy", *shorter, "--timeout", "0")
    assert "back to release 1" in remoe("rollback", "--timeout", "0")
    assert "Nothing would change" in remoe("diff", *deployment[1:])
    assert "gateway" in remoe("status", "--namespace", NAMESPACE)
    assert "MISSING" in remoe("preflight", *deployment[1:], code=1)
    assert "removed" in remoe("destroy", "--yes")
    assert {path for path, _ in api.objects} == {"/api/v1/namespaces"}
    assert "nothing of Remoe" in remoe("destroy", "--yes")


def test_a_cluster_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="KUBECONFIG"):
        Cluster.connect()
    with FakeApi() as gone:
        url = gone.url
    with connected(url) as cluster, pytest.raises(UnavailableError, match="does not answer"):
        cluster.list("v1", "Node")
