"""Metrics say what happened, and dashboards and alerts ask only for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.histogram import BulkHistogram
from gateway.receipt import ChoiceRecord
from tests.gateway.conftest import Stack, eventually
from tests.gateway.tiny_text import MODEL

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WATCHING = sorted([*DEPLOY.glob("grafana/**/*.*"), *DEPLOY.glob("prometheus/**/*.*")])
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def samples(url: str) -> dict[str, float]:
    """Every sample of a metrics page, as Prometheus' own parser reads it."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_request_in_metrics(
    stack: Stack, serve_gateway: Callable[..., str], tmp_path: Path
) -> None:
    url = serve_gateway(ledger=f"sqlite:///{tmp_path / 'l.db'}")
    stack.main.say("one two three")
    tokens = len(stack.encode("one two three"))
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
    eventually(lambda: "remoe_request_seconds_count" in samples(url))
    eventually(lambda: samples(url)["remoe_request_seconds_count"] == 1)
    seen = samples(url)
    assert seen["remoe_tokens_total,kind=completion"] == tokens
    # The fake's tokens may all arrive together.
    assert 0 <= seen["remoe_inter_token_latency_seconds_count"] < tokens
    assert seen["remoe_remote_calls_total"] == 3
    assert seen["remoe_remote_retries_total"] == 1
    assert seen["remoe_local_fallbacks_total"] == 2
    assert seen["remoe_gb_seconds_total,part=main_cpu"] == 2.0 * tokens
    assert seen["remoe_hit_rate_sum,kind=predicted"] == 0.75
    assert seen["remoe_activation_error_count"] == 1
    assert seen["remoe_actual_to_predicted_count,what=cost"] == 1
    assert seen["remoe_layer_load_cv,layer=0,replicas=one"] == 0.5
    assert seen["remoe_layer_load_cv,layer=0,replicas=scaled"] == 0.125
    assert seen["remoe_layer_load_overlap,layer=0"] == 0.75
    assert seen["remoe_function_wanted_replicas,function=experts-0"] == 2
    assert seen["remoe_attached_experts"] == 3
    assert seen["remoe_queue_seconds_sum"] == 0.25
    assert seen["remoe_ledger_failing"] == 0
    assert seen["remoe_ledger_pending_rows"] == 0
    assert seen["remoe_open_requests"] == 0


def test_moments_with_new_tokens_are_what_is_between_them() -> None:
    record = ChoiceRecord()
    for moment in (1.0, 1.5, 1.75):
        record.came(moment)
    assert record.gaps_s == [0.5, 0.25]
    assert (record.first_token_at, record.last_token_at) == (1.0, 1.75)


def test_errors_by_code(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway()
    httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "model": "unknown"})
    eventually(lambda: samples(url).get("remoe_errors_total,code=model_not_found") == 1)


def _exported(url: str) -> set[str]:
    """All names, those of labelled metrics without a sample included."""
    names = set()
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            names.add(name)
            if kind == "histogram":
                names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return names


@pytest.mark.parametrize("path", WATCHING, ids=lambda path: path.name)
def test_every_metric_asked_for_exists(
    stack: Stack, serve_gateway: Callable[..., str], path: Path
) -> None:
    text = path.read_text("utf-8")
    if path.suffix == ".json":
        board = json.loads(text)
        expressions = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    else:
        yaml = pytest.importorskip("yaml")
        rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
        expressions = [rule["expr"] for rule in rules]
        assert all(rule["annotations"]["description"] for rule in rules)
    asked = {name for expr in expressions for name in re.findall(r"\bremoe_\w+", expr)}
    assert asked
    assert asked <= _exported(serve_gateway())


@given(st.lists(st.floats(0, 5)))
def test_the_bulk_histogram_counts_as_the_library_s_does(values: list[float]) -> None:
    buckets = (0.1, 0.5, 1.0, 2.5)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    BulkHistogram("h", "text", buckets, ours).observe_many(values)
    histogram = Histogram("h", "text", registry=theirs, buckets=buckets)
    for value in values:
        histogram.observe(value)

    def page(registry: CollectorRegistry) -> list[str]:
        lines = generate_latest(registry).decode().splitlines()
        return [line for line in lines if "_created" not in line]

    assert page(ours) == page(theirs)
