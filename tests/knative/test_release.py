"""What a cluster gets: golden, in the API's own schemas, and changed only by what matters."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import yaml
from cloudcoil.models.knative_serving.serving.v1 import Service
from hypothesis import given
from hypothesis import strategies as st
from lightkube.models import core_v1, networking_v1, rbac_v1

from knative.cluster.files import write_kustomize, yaml_text
from knative.cluster.options import ClusterOptions
from knative.cluster.release import HASH, Release, render
from knative.cluster.weights import parse_weights
from knative.deployment import DeploymentOptions, default_deployment
from remoe.errors import SettingsError
from remoe.plan import Slo
from remoe.quantities import cpu_quantity, memory_quantity, parse_quantity
from tests.tiny_model import LAYERS

BOOKS = "books"
GOLDEN = Path(__file__).parent / "golden" / "release.yaml"
MODELS: dict[str, type[msgspec.Struct]] = {
    "ConfigMap": core_v1.ConfigMap,
    "NetworkPolicy": networking_v1.NetworkPolicy,
    "Role": rbac_v1.Role,
    "RoleBinding": rbac_v1.RoleBinding,
    "ServiceAccount": core_v1.ServiceAccount,
}


def _strict(schema: Any) -> Any:
    """The schema with no room for fields that it does not name."""
    if isinstance(schema, dict):
        schema = {key: _strict(value) for key, value in schema.items()}
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        schema = [_strict(one) for one in schema]
    return schema


SERVICE = jsonschema_rs.validator_for(_strict(Service.model_json_schema(by_alias=True)))
WEIGHTS = [
    {"weights": "image:/models/tiny"},
    {"weights": "claim:models/tiny"},
    {"weights": "hub:owner/name@main"},
    {"weights": "node:/var/models/tiny"},
    {"weights": "claim:cache/tiny", "cached_from": "claim:models/tiny"},
    {"weights": "claim:cache/tiny", "cached_from": "hub:owner/name"},
    {"weights": "claim:cache/tiny", "cached_from": "node:/var/models/tiny"},
]


def released(model_dir: Path, **options: Any) -> Release:
    deployment = default_deployment(
        DeploymentOptions(model_dir=model_dir, threads=2, layers_per_function=2)
    )
    return render(deployment, ClusterOptions(**{"weights": "claim:models/tiny", **options}))


def environment(release: Release, component: str) -> dict[str, Any]:
    (service, *_) = (
        one
        for one in release.services
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == component
    )
    return {one["name"]: one for one in template(service)["containers"][0]["env"]}


def template(service: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = service["spec"]["template"]["spec"]
    return spec


def test_a_release_is_the_golden_one(tiny_model_dir: Path) -> None:
    release = released(
        tiny_model_dir, slo=Slo(ttft_s=2, tpot_s=0.1), gpus=1, history_claim="history"
    )
    text = yaml_text(release.objects).replace(release.topology.model_digest, "sha256:weights")
    text = text.replace(release.model, "tiny")
    text = re.sub(r"(remoe-(gateway|planner|main|expert))-[0-9a-f]{8}", r"\1-00000000", text)
    text = re.sub(r"remoe.dev/hash: '?[0-9a-f]{16}'?", "remoe.dev/hash: '0'", text)
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [*WEIGHTS, {"gpus": 2}, {"history_claim": "h"}], ids=str)
def test_objects_are_what_the_api_defines(tiny_model_dir: Path, options: dict[str, Any]) -> None:
    """Every field is in the API's schema, and of its type."""
    for one in released(tiny_model_dir, **options).objects:
        plain = msgspec.to_builtins(one)
        if plain["kind"] == "Service":
            SERVICE.validate(plain)
        else:
            # Through the API's types and back: a field that they do not know would be lost.
            back = msgspec.to_builtins(msgspec.convert(plain, MODELS[plain["kind"]]))
            kind = {key: plain[key] for key in ("apiVersion", "kind")}
            assert back | kind == plain


def test_the_schema_finds_a_misspelt_field(tiny_model_dir: Path) -> None:
    service = msgspec.to_builtins(released(tiny_model_dir).services[0])
    service["spec"]["template"]["spec"]["timeoutSecond"] = 1
    with pytest.raises(jsonschema_rs.ValidationError, match="timeoutSecond"):
        SERVICE.validate(service)


def test_names_fit_and_services_stay_in_the_tens(tiny_model_dir: Path) -> None:
    release = released(tiny_model_dir)
    names = [one["metadata"]["name"] for one in release.services]
    assert len(names) == 3 + -(-LAYERS // 2)
    assert all(len(name) <= 45 for name in names)
    assert names[-1] == "gateway"  # who needs the others comes last


def test_no_object_holds_a_secret(tiny_model_dir: Path) -> None:
    release = released(tiny_model_dir, public=True, ledger_secret=BOOKS)
    assert all(one["kind"] != "Secret" for one in release.objects)
    for component in ("main", "expert"):
        token = environment(release, component)["REMOE_EXPERT_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "remoe-expert-token", "key": "token"}
    assert "REMOE_EXPERT_TOKEN" not in environment(release, "gateway")
    assert environment(release, "gateway")["REMOE_GATEWAY_LEDGER"]["valueFrom"]
    assert environment(release, "gateway")["REMOE_GATEWAY_AUTH"]["value"] == "required"


def test_only_a_public_gateway_is_seen_from_outside(tiny_model_dir: Path) -> None:
    visibility = "networking.knative.dev/visibility"
    for public in (False, True):
        release = released(tiny_model_dir, public=public, ledger_secret=BOOKS)
        outside = [
            one["metadata"]["name"]
            for one in release.services
            if visibility not in one["metadata"]["labels"]
        ]
        assert outside == (["gateway"] if public else [])
    with pytest.raises(SettingsError, match="--ledger-secret"):
        released(tiny_model_dir, public=True)


def test_containers_hold_to_the_restricted_standard(tiny_model_dir: Path) -> None:
    for options in WEIGHTS:
        for service in released(tiny_model_dir, **options).services:
            spec = template(service)
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                security = container["securityContext"]
                assert security["runAsNonRoot"]
                assert security["readOnlyRootFilesystem"]
                assert not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_same_settings_make_the_same_release(tiny_model_dir: Path) -> None:
    assert released(tiny_model_dir) == released(tiny_model_dir)


def test_a_template_that_changes_changes_its_hash_alone(tiny_model_dir: Path) -> None:
    before, after = released(tiny_model_dir), released(tiny_model_dir, gpus=1)
    changed = [
        a["metadata"]["name"]
        for a, b in zip(before.services, after.services, strict=True)
        if a["metadata"]["annotations"][HASH] != b["metadata"]["annotations"][HASH]
    ]
    assert changed == [f"{before.model.lower()}-main"] or changed[0].endswith("-main")
    assert len(changed) == 1


def test_timeouts_follow_the_slo_within_what_the_cluster_allows(tiny_model_dir: Path) -> None:
    loose = released(tiny_model_dir, slo=Slo(ttft_s=30, tpot_s=10), max_output_tokens=1000)
    tight = released(tiny_model_dir, slo=Slo(ttft_s=1, tpot_s=0.1), max_output_tokens=100)
    for release, timeout_s in ((loose, 600), (tight, 30 + 61 + 22)):
        for service in release.services[-2:]:
            assert template(service)["timeoutSeconds"] == timeout_s
            assert template(service)["responseStartTimeoutSeconds"] <= timeout_s
    assert template(tight.services[-1])["responseStartTimeoutSeconds"] == 30 + 61 + 2


def test_a_cluster_without_zero_initial_scale_starts_each_once(tiny_model_dir: Path) -> None:
    for zero, scale in ((True, "0"), (False, "1")):
        release = released(tiny_model_dir, zero_initial_scale=zero)
        expert = release.services[1]["spec"]["template"]["metadata"]["annotations"]
        assert expert["autoscaling.knative.dev/initial-scale"] == scale


def test_files_of_this_machine_travel_with_the_topology(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    book = tmp_path / "mine.json"
    book.write_text("{}", encoding="utf-8")
    options = DeploymentOptions(model_dir=tiny_model_dir, threads=1, prices=str(book))
    release = render(default_deployment(options), ClusterOptions())
    for service, reads in (("gateway", True), ("planner", True), ("main", False)):
        assert ("prices.json" in files_of(release, service)) is reads
        assert ("REMOE_PRICES" in environment(release, service)) is reads
    assert environment(release, "planner")["REMOE_PRICES"]["value"] == "/etc/remoe/prices.json"


def files_of(release: Release, service: str) -> dict[str, str]:
    """What its ConfigMap holds."""
    (name, *_) = (
        volume["configMap"]["name"]
        for one in release.services
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == service
        for volume in template(one)["volumes"]
        if volume["name"] == "files"
    )
    (data,) = (one["data"] for one in release.objects if one["metadata"]["name"] == name)
    return dict(data)


def test_what_concerns_other_services_makes_no_revision(tiny_model_dir: Path) -> None:
    """A main function of another size leaves the streams' gateway and warm experts alone."""

    def hashes(main_memory_mib: int) -> dict[str, str]:
        options = DeploymentOptions(
            model_dir=tiny_model_dir, threads=2, main_memory_mib=main_memory_mib
        )
        services = render(default_deployment(options), ClusterOptions()).services
        return {one["metadata"]["name"]: one["metadata"]["annotations"][HASH] for one in services}

    before, after = hashes(2000), hashes(3000)
    changed = {name.rpartition("-")[2] for name in before if before[name] != after[name]}
    assert changed == {"planner", "main"}


def test_gpus_and_reservations_reach_the_main_function_alone(tiny_model_dir: Path) -> None:
    release = released(tiny_model_dir, gpus=2, cpu_request=0.025)
    for service in release.services:
        resources = template(service)["containers"][0]["resources"]
        main = service["metadata"]["labels"]["app.kubernetes.io/component"] == "main"
        assert resources["limits"].get("nvidia.com/gpu") == ("2" if main else None)
        assert resources["requests"]["cpu"] == "25m"
        assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_a_kustomize_base_holds_the_same_objects(tiny_model_dir: Path, tmp_path: Path) -> None:
    release = released(tiny_model_dir)
    write_kustomize(release, tmp_path)
    base = yaml.safe_load((tmp_path / "kustomization.yaml").read_text(encoding="utf-8"))
    found = [
        one
        for name in base["resources"]
        for one in yaml.safe_load_all((tmp_path / name).read_text(encoding="utf-8"))
    ]
    key = "metadata"
    assert sorted(found, key=lambda one: (one["kind"], one[key]["name"])) == sorted(
        msgspec.to_builtins(release.objects), key=lambda one: (one["kind"], one[key]["name"])
    )


@pytest.mark.parametrize(
    "source",
    ["", "pvc:x", "image:relative", "claim:", "claim:Upper", "node:/", "node:/m", "hub:noslash"],
)
def test_a_bad_source_of_weights_is_refused(source: str) -> None:
    with pytest.raises(SettingsError, match="node:"):
        parse_weights(source)


def test_only_a_claims_folder_is_filled_from_elsewhere() -> None:
    for source in ("image:/m", "node:/a/b", "hub:a/b", "claim:cache"):
        with pytest.raises(SettingsError, match="write claim:NAME/folder"):
            parse_weights(source, cached_from="hub:a/b")
    assert parse_weights("claim:cache/m", cached_from="node:/c/d").flags == (
        "kubernetes.podspec-persistent-volume-claim",
        "kubernetes.podspec-persistent-volume-write",
        "kubernetes.podspec-init-containers",
        "kubernetes.podspec-volumes-hostpath",
    )


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_mounts_are_what_knatives_webhook_takes(
    tiny_model_dir: Path, options: dict[str, Any]
) -> None:
    """Only an emptyDir or a claim that is not read-only may be mounted to be written to."""
    for service in released(tiny_model_dir, **options).services:
        spec = template(service)
        volumes = {one["name"]: one for one in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for mount in container["volumeMounts"]:
                volume = volumes[mount["name"]]
                claim = volume.get("persistentVolumeClaim", {"readOnly": True})
                writable = "emptyDir" in volume or not claim.get("readOnly", False)
                assert mount.get("readOnly", False) or writable


@given(st.integers(1, 10**6))
def test_memory_is_read_as_it_is_written(mib: int) -> None:
    assert parse_quantity(memory_quantity(mib)) == mib * 1024**2


def test_quantities_are_written_as_the_api_server_would() -> None:
    """Else each look at a Service would find a difference."""
    assert [memory_quantity(mib) for mib in (96, 2048, 2560, 1 << 20)] == [
        "96Mi",
        "2Gi",
        "2560Mi",
        "1Ti",
    ]
    assert [cpu_quantity(cores) for cores in (0.0001, 0.025, 1.0, 1.5)] == [
        "1m",
        "25m",
        "1",
        "1500m",
    ]


@given(st.floats(0.001, 1024))
def test_cores_are_read_within_a_thousandth(cores: float) -> None:
    assert abs(parse_quantity(cpu_quantity(cores)) - cores) <= 0.0005 + 1e-9


@given(st.text(max_size=8))
def test_what_is_no_quantity_is_refused_and_never_anything_else(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_quantity(text), float)


def test_the_weights_digest_is_the_deployments(tiny_model_dir: Path) -> None:
    topology = released(tiny_model_dir).topology
    topology.check_weights(topology.model_digest)
    with pytest.raises(Exception, match="made for"):
        topology.check_weights("sha256:other")
    msgspec.structs.replace(topology, model_digest="").check_weights("sha256:any")
