"""A deployment that is planned for an SLO, by what was measured on this very cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

from knative.deployment import DeploymentOptions, model_name
from remoe.cli.offline_plan import preview_plan
from remoe.hardware import CallTimes, HardwareProfile, newest_profile
from remoe.plan import Plan
from tests.e2e.cluster.asking import PROMPTS, Answer, asked
from tests.e2e.cluster.conftest import Options, Record
from tests.e2e.cluster.kubernetes import Cluster

PROMPT_TOKENS, OUTPUT_TOKENS = 40, 24
USUAL = (
    *("--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)),
    *("--ratio-rule", "largest"),
)
_LOOSE, _TIGHT = 0.5, 0.25  # shares of remote experts that the two SLOs leave


@pytest.fixture(scope="module")
def deployed(cluster: Cluster, options: Options) -> Iterator[None]:
    """Half of the experts remote, without a plan; nothing is left afterwards."""
    cluster.remoe("deploy", *options)
    yield
    cluster.remoe("destroy", "--yes")


@pytest.fixture(scope="module")
def calls(cluster: Cluster, deployed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Times of calls, made in the main function's container."""
    asked(cluster, PROMPTS[0])
    (main,) = cluster.names("main")
    (pod,) = cluster.pods(main)
    path = tmp_path_factory.mktemp("calls") / "calls.json"
    measure = ("python", "-m", "main_model_fn.call_times", "--calls", "200")
    inside = ("exec", pod["metadata"]["name"], "-c", "user-container", "--")
    path.write_text(cluster.kubectl(*inside, *measure), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def profile(cluster: Cluster, calls: Path, model_dir: Path) -> Path:
    """The hardware profile that `remoe deploy` plans with from here on."""
    command = ("profile", "hardware", "--model-dir", str(model_dir), "--seconds", "0.3")
    cluster.command(*command, "--calls", str(calls))
    path = newest_profile(cluster.home, model_name(model_dir))
    assert path is not None
    return path


@pytest.fixture(scope="module")
def slos(profile: Path, model_dir: Path) -> dict[float, Options]:
    """By the share of remote experts: an SLO that no larger share holds."""

    def plan(share: float) -> Plan:
        return preview_plan(
            DeploymentOptions(model_dir=model_dir, threads=2, hardware=profile, remote_ratio=share),
            slo=None,
            rule="fixed",
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
        )

    found: dict[float, Options] = {}
    for share in (_LOOSE, _TIGHT):
        tpot_s = plan(share).slo_tpot_s
        assert tpot_s is not None
        found[share] = ("--slo", f"ttft=60,tpot={1.01 * tpot_s:.6f}", *USUAL)
    return found


def test_times_of_calls_through_ingress_and_queue_proxy_enter_the_profile(
    calls: Path, profile: Path, record: Record
) -> None:
    measured, kept = CallTimes.load(calls), HardwareProfile.load(profile)
    assert kept.invocation == measured.invocation
    assert kept.bandwidth_bytes_per_s == measured.bandwidth_bytes_per_s
    record(
        "t_rem_ms",
        {
            name: round(1e3 * getattr(measured.invocation, f"{name}_s"), 2)
            for name in ("mean", "median", "p95")
        },
    )
    record("t_rem_mb_per_s", round(measured.bandwidth_bytes_per_s / 1e6, 1))


def test_a_tighter_slo_drops_no_stream_and_rollback_restores(
    cluster: Cluster,
    options: Options,
    slos: dict[float, Options],
    local_answers: dict[str, str],
    record: Record,
) -> None:
    loose, tight = ((*options, *slos[share]) for share in (_LOOSE, _TIGHT))
    cluster.remoe("deploy", *loose)
    before = cluster.revisions()
    shown = cluster.remoe("diff", *tight, "--exit-code", check=False)
    assert shown.returncode == 1
    assert "REMOE_PLANNER_REMOTE_RATIO" in shown.stdout
    assert "each further token, s" in shown.stdout
    assert cluster.revisions() == before
    record("diff", "\n" + shown.stdout)
    answers = streams_during(lambda: cluster.remoe("deploy", *tight), cluster, record)
    assert {one.finish for _, one in answers} <= {"stop", "length"}
    assert all(one.text == local_answers[prompt] for prompt, one in answers)
    changed = {name for name, value in cluster.revisions().items() if value != before[name]}
    assert set(cluster.names("main")) <= changed
    assert asked(cluster, PROMPTS[0]).text == local_answers[PROMPTS[0]]
    cluster.remoe("rollback")
    assert "Nothing would change" in cluster.remoe("diff", *loose).stdout
    assert asked(cluster, PROMPTS[0]).text == local_answers[PROMPTS[0]]


def streams_during(
    change: Callable[[], object], cluster: Cluster, record: Record
) -> list[tuple[str, Answer]]:
    """Four streams at a time, from before the change until after it."""
    running, over = threading.Barrier(5, timeout=120), threading.Event()

    def keep_asking(prompt: str) -> list[tuple[str, Answer]]:
        answers: list[tuple[str, Answer]] = []

        def begun(count: int) -> None:
            if count == 1 and not answers:
                running.wait()

        while not over.is_set():
            answers.append((prompt, asked(cluster, prompt, on_piece=begun)))
        return answers

    with ThreadPoolExecutor(len(PROMPTS)) as streams:
        asking = [streams.submit(keep_asking, prompt) for prompt in PROMPTS]
        running.wait()
        began = time.monotonic()
        try:
            change()
        finally:
            over.set()
        took_s = time.monotonic() - began
        answers = [one for future in asking for one in future.result()]
    record("new plan", f"{took_s:.1f} s, {len(answers)} streams meanwhile")
    record("longest stream meanwhile", f"{max(one.total_s for _, one in answers):.1f} s")
    return answers


@pytest.mark.parametrize("share", [_TIGHT, _LOOSE])
def test_predictions_are_compared_with_what_happens(
    cluster: Cluster,
    options: Options,
    slos: dict[float, Options],
    share: float,
    record: Record,
) -> None:
    """Before the planner has seen a request here, and after it has seen twenty."""
    cluster.remoe("deploy", *options, *slos[share])
    first = asked(cluster, PROMPTS[0]).x_remoe["predicted"]
    for prompt in 5 * PROMPTS:
        asked(cluster, prompt)
    receipts = [asked(cluster, prompt).x_remoe for prompt in 2 * PROMPTS]
    assert all(one["cold_start_ms"] == 0 for one in receipts)
    lines = []
    for name in ("ttft_ms", "tpot_ms", "cost_usd"):
        measured = median(one[name] for one in receipts)
        learned = median(one["predicted"][name] / one[name] for one in receipts)
        bare = first[name] / median(
            one[name] for one in receipts[:: len(PROMPTS)]
        )  # of the same prompt
        assert bare > 0
        lines.append(
            f"{name}: measured {measured:.6g}, predicted at first x{bare:.2f}, "
            f"after 20 requests x{learned:.2f}"
        )
    record(f"predictions at {share}", "\n" + "\n".join(lines))
