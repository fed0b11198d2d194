"""Whole runs over real sockets: against servers of all kinds, and against the real gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from loadgen.config import LoadConfig
from loadgen.platform import FunctionSample
from loadgen.record import read_records
from loadgen.report import run_page, write_report
from loadgen.results import SCHEMA_VERSION, RunFolder, RunResult
from loadgen.run import Load, run_load
from remoe.activation_totals import ActivationTotals
from remoe.errors import SettingsError, UnavailableError
from tests.gateway.conftest import Stack, serve
from tests.loadgen.records import platform_samples, receipt, record, result
from tests.loadgen.servers import Picky, null_server


def run(folder: Path, load: Load | None = None, **config: object) -> RunResult:
    values: dict[str, object] = {
        "arrivals": "constant",
        "stages": "40@0.5s",
        "prompt_tokens": 20,
        "output_tokens": 4,
        "ready_timeout_s": 5.0,
    }
    told = msgspec.convert(values | config, LoadConfig)
    return asyncio.run(run_load(told, RunFolder(folder), load or Load()))


def test_a_run_leaves_everything_in_its_folder(null_url: str, tmp_path: Path) -> None:
    found = run(tmp_path / "run", url=null_url, warm_up=2, slo=["ttft_p99<5s"], detailed=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "target.json", "requests.jsonl", "run.json", "summary.csv"}
    document = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert document["schema_version"] == SCHEMA_VERSION
    assert (document["completed"], document["num_prompts"]) == (20, 20)
    assert document["total_output_tokens"] == 80
    assert len(document["ttfts"]) == len(document["itls"]) == 20
    for name in ("mean_ttft_ms", "median_tpot_ms", "p99_itl_ms", "std_e2el_ms"):
        assert document[name] > 0
    assert found.summary.latency.ttft_ms.min is not None
    assert found.summary.latency.ttft_ms.min >= 20
    records = list(read_records(tmp_path / "run" / "requests.jsonl"))
    assert sum(entry.warm_up for entry in records) == 2
    assert len(records) == 22
    csv = (tmp_path / "run" / "summary.csv").read_text()
    assert "requests.completed,20\n" in csv
    assert "latency.ttft_ms.p99," in csv


def test_a_folder_is_not_written_over(null_url: str, tmp_path: Path) -> None:
    run(tmp_path, url=null_url)
    with pytest.raises(SettingsError, match="already holds a run"):
        run(tmp_path, url=null_url)


def test_completions_and_closed_loops(null_url: str, tmp_path: Path) -> None:
    found = run(
        tmp_path, url=null_url, endpoint="completions", arrivals="closed", concurrency=3, requests=9
    )
    assert found.summary.requests.completed == 9
    assert found.summary.requests.most_in_flight == 3
    assert found.summary.latency.lag_ms.n == 0


def test_a_closed_loop_for_some_time_plans_no_number(null_url: str, tmp_path: Path) -> None:
    found = run(tmp_path, url=null_url, arrivals="closed", concurrency=2, duration_s=0.5)
    requests = found.summary.requests
    assert requests.planned == requests.completed == len(found.records) > 4
    assert found.target.planned is None
    assert "cut off" not in run_page(found)


@pytest.mark.parametrize(
    ("refused", "note", "field"),
    [
        ("ignore_eos", "refuses ignore_eos", "max_tokens"),
        ("max_tokens", "wants max_completion_tokens", "max_completion_tokens"),
        ("stream_options", "refuses stream_options", "max_tokens"),
        ("temperature", "refuses temperature", "max_tokens"),
    ],
)
def test_what_a_server_refuses_is_left_out_and_said(
    tmp_path: Path, refused: str, note: str, field: str
) -> None:
    picky = Picky(refused)
    with serve(picky.app) as url:
        found = run(tmp_path, url=f"{url}/v1", stages="10@0.5s")
    assert found.summary.requests.completed == 5
    assert any(note in line for line in found.target.notes)
    assert refused not in picky.bodies[-1]
    assert picky.bodies[-1][field] == 4


def test_prompts_are_cut_by_the_servers_own_count(tmp_path: Path) -> None:
    with serve(Picky().app) as url:
        found = run(tmp_path, url=f"{url}/v1", stages="10@0.5s", prompt_tokens=60)
    # Picky counts a token for four characters, and ten for its template.
    assert "4.00 characters a token, 10 tokens of chat template" in found.target.counted
    assert {entry.prompt_tokens for entry in found.records} <= {59, 60}


def test_without_usage_chunks_are_counted(tmp_path: Path) -> None:
    with serve(Picky(usage=False).app) as url:
        found = run(tmp_path, url=f"{url}/v1", stages="10@0.5s")
    assert found.summary.tokens.output == 20
    assert found.summary.tokens.counted_by.startswith("usage for 0 of 5")
    assert any("4 characters are taken" in line for line in found.target.notes)


def test_streams_that_end_too_early_are_incomplete(tmp_path: Path) -> None:
    picky = Picky()
    with serve(picky.app) as url:
        picky.ends_early = True
        found = run(tmp_path, url=f"{url}/v1", probe=False, stages="10@0.5s")
    assert found.summary.requests.incomplete == 5
    assert found.summary.requests.errors[0].label == "incomplete stream"


def test_errors_are_grouped_and_stop_the_run(tmp_path: Path) -> None:
    with serve(Picky(status=503).app) as url:
        found = run(tmp_path, url=f"{url}/v1", probe=False, stages="100@5s", max_errors=10)
    assert found.target.stopped == "10 requests failed (--max-errors 10)"
    group = found.summary.requests.errors[0]
    assert (group.label, group.examples) == ("http 503 busy", ["no"])
    assert found.summary.requests.failed < 30
    assert "The run was stopped" in run_page(found)


def test_a_reply_that_is_no_stream_is_a_record(tmp_path: Path) -> None:
    app = Starlette(
        routes=[
            Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "m"}]})),
            Route("/v1/chat/completions", lambda _: PlainTextResponse("hello"), methods=["POST"]),
        ]
    )
    with serve(app) as url:
        found = run(tmp_path, url=f"{url}/v1", probe=False, stages="4@0.5s")
    assert found.summary.requests.errors[0].label == "not a stream"
    assert found.summary.requests.errors[0].examples == ["the reply is text/plain"]


def test_no_server_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with null_server() as url:
        pass
    with pytest.raises(UnavailableError, match="did not answer within 1 s"):
        run(tmp_path / "run", url=url, ready_timeout_s=1.0)
    assert not (tmp_path / "run").exists()


def test_a_slow_answer_times_out(tmp_path: Path) -> None:
    with null_server(ttft_s=30.0) as url:
        found = run(tmp_path, url=url, probe=False, stages="4@0.5s", timeout_s=0.3)
    assert found.summary.requests.errors[0].label == "timeout"
    assert found.summary.requests.failed == 2


def test_a_wrong_model_is_refused_before_anything_is_written(null_url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no model 'gpt', but null"):
        run(tmp_path / "run", url=null_url, model="gpt")
    assert not (tmp_path / "run").exists()


class FakeProbe:
    """A platform whose counters rise by one request each time they are read."""

    def __init__(self) -> None:
        self.read = 0

    def functions(self) -> list[FunctionSample]:
        return platform_samples(3)[3].functions

    def activations(self) -> ActivationTotals:
        self.read += 1
        routes = [[2.0 * self.read, 1.0 * self.read]]
        return ActivationTotals(requests=self.read, predicted=routes, actual=routes)


def test_a_platform_is_sampled_while_it_is_loaded(null_url: str, tmp_path: Path) -> None:
    found = run(tmp_path, Load(probe=FakeProbe()), url=null_url)
    assert len(found.samples) >= 2
    assert found.summary.platform is not None
    assert found.summary.platform.resident_gb_s > 0
    assert found.target.activations == ActivationTotals(
        requests=1, predicted=[[2.0, 1.0]], actual=[[2.0, 1.0]]
    )


def test_the_gateway_answers_with_receipts(stack: Stack, tmp_path: Path) -> None:
    """The contract with `x_remoe`: the real gateway, with a main function that echoes."""
    found = run(tmp_path, url=f"{stack.url}/v1", stages="10@1s", prompt_tokens=60, output_tokens=5)
    summary = found.summary
    assert summary.requests.completed == 10
    assert found.target.ignore_eos
    assert [entry.output_tokens for entry in found.records] == [5] * 10
    assert all(entry.finish_reason == "length" for entry in found.records)
    assert stack.main.requests[-1].max_new_tokens == 5
    assert summary.tokens.prompt_ratio == pytest.approx(1.0, abs=0.15)
    assert summary.cold_starts is not None
    assert summary.cold_starts.touched == 10
    # What tests/gateway/fakes.py claims to have used for each request.
    assert summary.cold_starts.experts_ms.p50 == 125.0
    assert summary.experts is not None
    assert summary.experts.remote_calls == 30
    assert summary.experts.predicted_hit_rate == pytest.approx(0.75)
    assert summary.experts.hit_rate is not None
    assert 0.75 < summary.experts.hit_rate < 1.0  # all prompt tokens hit, no output token does
    assert summary.experts.remote_bytes_per_token == pytest.approx(10 * 1000 / 50)
    assert summary.cost is not None
    assert summary.cost.remote_gb_s == pytest.approx(5.0)
    assert summary.cost.main_gb_s == pytest.approx(10 * (1.0 + 2.0 * 5))
    assert summary.cost.predicted_usd == pytest.approx(10 * 0.001)
    page = write_report(found, RunFolder(tmp_path)).read_text()
    assert page.count("data:image/svg+xml;base64,") == 6  # no planner is seen: no heat map


def test_a_page_has_seven_plots_and_needs_nothing_else(tmp_path: Path) -> None:
    records = [record(i, receipt=receipt(cold_start_ms=250.0 * (i % 2))) for i in range(20)]
    routes = [[3.0, 1.0], [0.0, 0.0], [1.0, 3.0]]
    found = result(
        records,
        slo=["ttft_p99<2s", "tpot<1ms"],
        samples=platform_samples(),
        activations=ActivationTotals(requests=20, predicted=routes, actual=routes[::-1]),
    )
    page = run_page(found)
    assert page.count("data:image/svg+xml;base64,") == 7
    assert "SLO missed" in page
    assert "waited" in page
    for outside in ('src="http', "<script", "<link", "@import", "url("):
        assert outside not in page


@pytest.mark.parametrize("records", [[], [record(status="failed", first_token_s=None)]])
def test_a_page_without_answers_says_what_is_missing(records: list[object]) -> None:
    page = run_page(result(records))  # type: ignore[arg-type]
    assert page.count("Nothing to draw") == 3


def test_a_cut_off_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    whole = msgspec.json.encode(record(0)) + b"\n"
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert list(read_records(path)) == [record(0)]
    path.write_bytes(whole + b"{}x\n" + whole)
    with pytest.raises(SettingsError, match=r"requests.jsonl:2: "):
        list(read_records(path))
