"""The default deployment, and the Knative Services that the same description becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from knative.deployment import Deployment, DeploymentOptions, default_deployment
from knative.manifest import service_manifest
from knative.policy import AUTOSCALING
from knative.spec import MAX_NAME_LENGTH, FunctionSpec
from remoe.errors import CheckpointError, SettingsError
from tests.tiny_families import build_tiny_family

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def options(tiny_model_dir: Path) -> DeploymentOptions:
    return DeploymentOptions(model_dir=tiny_model_dir, threads=2, layers_per_function=2)


def test_functions_cover_every_layer_once(options: DeploymentOptions) -> None:
    deployment = default_deployment(options)
    assert deployment.layer_ranges == ((0, 1), (2, 2))
    assert [spec.holds for spec in deployment.experts] == [
        "layers 0-1, 8 experts",
        "layer 2, 4 experts",
    ]
    assert [spec.module for spec in deployment.functions] == [
        "gateway",
        "planner",
        "main_model_fn",
        "expert_fn",
        "expert_fn",
    ]
    assert deployment.experts[1].env["REMOE_EXPERT_FIRST_LAYER"] == "2"
    assert deployment.experts[1].env["REMOE_EXPERT_LAST_LAYER"] == "2"


def test_an_expert_function_computes_on_the_cores_it_is_given(tiny_model_dir: Path) -> None:
    for threads, cores in ((1, 1), (2, 1), (9, 4)):
        deployment = default_deployment(
            DeploymentOptions(model_dir=tiny_model_dir, threads=threads)
        )
        for spec in deployment.experts:
            assert (spec.env["REMOE_EXPERT_THREADS"], spec.cpu) == (str(cores), cores)


def test_dense_layers_need_no_function_and_no_memory_for_experts(tmp_path: Path) -> None:
    model_dir = build_tiny_family(tmp_path, "qwen3_moe", layers=7)  # experts in layers 1, 3 and 5
    options = DeploymentOptions(model_dir=model_dir, threads=2, layers_per_function=2)
    deployment = default_deployment(options)
    assert deployment.layer_ranges == ((1, 3), (5, 5))
    assert [spec.holds for spec in deployment.experts] == [
        "layers 1-3, 8 experts",
        "layer 5, 4 experts",
    ]


def test_the_topology_names_each_functions_url_and_layers(options: DeploymentOptions) -> None:
    deployment = default_deployment(options)
    urls = {spec.name: f"http://{spec.name}" for spec in deployment.functions}
    topology = deployment.topology(urls)
    assert topology.gateway_url == "http://gateway"
    assert topology.expert_for(2).url == f"http://{deployment.experts[1].name}"
    assert topology.main_memory_gb > topology.experts[0].memory_gb > 0


def test_the_gateway_and_planner_stay_and_the_rest_may_sleep(options: DeploymentOptions) -> None:
    deployment = default_deployment(
        replace(options, main_retention="5m", window="30s", remote_ratio=0.25, dtype="float32")
    )
    for spec in (deployment.gateway, deployment.planner):
        assert spec.policy().min_scale == 1
    main = deployment.main.policy()
    assert (main.min_scale, main.max_scale, main.initial_scale) == (0, 1, 1)
    assert main.retention_s == 300
    for spec in deployment.experts:
        expert = spec.policy()
        assert (expert.min_scale, expert.max_scale, expert.initial_scale) == (0, 2, 0)
        assert expert.window_s == 30
    assert deployment.planner.env["REMOE_PLANNER_REMOTE_RATIO"] == "0.25"
    assert deployment.main.env["REMOE_MAIN_DTYPE"] == "float32"


def test_the_planner_keeps_its_history_where_it_is_told(options: DeploymentOptions) -> None:
    told = default_deployment(replace(options, history_dir=Path("/kept")))
    assert told.planner.env["REMOE_PLANNER_HISTORY_DIR"] == "/kept"
    assert "REMOE_PLANNER_HISTORY_DIR" not in default_deployment(options).planner.env


def test_names_are_short_labels_whatever_the_model_is_called(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    odd = tmp_path / "8X_Model.with A very long name and then some more of it"
    odd.symlink_to(tiny_model_dir)
    deployment = default_deployment(DeploymentOptions(model_dir=odd, threads=1))
    assert deployment.experts[0].name.startswith("m-8x-model-with-a-very")
    names = [spec.name for spec in deployment.functions]
    assert len(set(names)) == len(names)
    assert all(len(name) <= MAX_NAME_LENGTH for name in names)
    assert deployment.experts[0].name.endswith("-experts-l00-l02")


def test_the_default_model_gets_the_documented_names(tmp_path: Path, tiny_model_dir: Path) -> None:
    for path in tiny_model_dir.iterdir():
        if path.name != "remoe.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "remoe.json").write_bytes(
        msgspec.json.encode({"name": "smollm2-8x135m", "digest": "sha256:0"})
    )
    deployment = default_deployment(DeploymentOptions(model_dir=tmp_path, threads=2))
    assert deployment.model == "smollm2-8x135m"
    assert deployment.main.name == "smollm2-8x135m-main"
    assert deployment.experts[0].name == "smollm2-8x135m-experts-l00-l02"


def test_one_function_can_hold_the_whole_model_but_not_nothing(
    options: DeploymentOptions,
) -> None:
    deployment = default_deployment(replace(options, layers_per_function=99))
    assert deployment.layer_ranges == ((0, 2),)
    with pytest.raises(SettingsError, match="at least 1 layer"):
        default_deployment(replace(options, layers_per_function=0))


def test_a_bad_window_and_a_missing_model_are_refused(
    options: DeploymentOptions, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"window: 3s is out of range: 6s to 1h"):
        default_deployment(replace(options, window="3s"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        default_deployment(replace(options, model_dir=tmp_path))


@pytest.mark.parametrize("name", ["gateway", "expert"])
def test_manifests_are_the_golden_ones(name: str) -> None:
    spec = {
        "gateway": FunctionSpec(
            name="gateway",
            module="gateway",
            timeout_s=600,
            annotations={AUTOSCALING + "min-scale": "1"},
            public=True,
        ),
        "expert": FunctionSpec(
            name="smollm2-8x135m-experts-l00-l04",
            module="expert_fn",
            env={"REMOE_EXPERT_LAST_LAYER": "4", "REMOE_EXPERT_FIRST_LAYER": "0"},
            container_concurrency=4,
            timeout_s=60,
            cpu=1.5,
            memory_mib=640,
            annotations={
                AUTOSCALING + "initial-scale": "0",
                AUTOSCALING + "window": "60s",
                "serving.knative.dev/progress-deadline": "2m",
            },
        ),
    }[name]
    rendered = service_manifest(spec, image="registry.example/remoe@sha256:0")
    assert rendered == msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes())


def test_every_function_of_the_deployment_renders_with_string_annotations(
    options: DeploymentOptions,
) -> None:
    deployment: Deployment = default_deployment(options)
    for spec in deployment.functions:
        manifest = service_manifest(spec, image="i")
        metadata = msgspec.convert(manifest["metadata"], dict[str, str | dict[str, str]])
        labels = metadata["labels"]
        local = "networking.knative.dev/visibility" in labels
        assert local is (spec is not deployment.gateway)
        template = msgspec.to_builtins(manifest["spec"])["template"]
        assert all(isinstance(value, str) for value in template["metadata"]["annotations"].values())
