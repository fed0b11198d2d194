"""The local platform for a table: `remoe up` on a port and in a home of its own, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import msgspec

from evaluation.workbench import Workbench
from loadgen.config import LoadConfig
from loadgen.results import RunFolder, RunResult
from loadgen.run import Load, run_load
from loadgen.statistics import Distribution
from remoe.errors import SettingsError, UnavailableError
from remoe.hardware import HardwareProfile

__all__ = ["Deployed", "LoadFigures", "Platform", "figures_of", "load", "platform"]

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.5
# The partition is first planned for whoever woke the platform; a planned one changes it with what
# comes, and should have done so before it is measured.
_ADAPT_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """How the platform is started: `remote_ratio` of each layer's experts, the least used by the
    model's history, and what sleeps when. `model_dir` is another than the table's."""

    name: str
    model_dir: Path | None = None
    remote_ratio: float = 0.5
    planned: bool = False
    window: str = "60s"
    main_retention: str = "10m"


@dataclass(frozen=True, slots=True)
class Platform:
    url: str
    home: Path
    started_s: float


@contextlib.contextmanager
def platform(bench: Workbench, deployed: Deployed) -> Iterator[Platform]:
    """Start it, wait until it answers, and stop it at the end.

    Its home is a fresh folder, so that it starts from the shipped history. With `planned` it has
    the hardware profile of `--hardware` and plans by it. UnavailableError if it does not start,
    SettingsError if something else is where it should be: that would be measured in its place.
    """
    _check_free(bench.options.port)
    # A short path: the control socket lies below it.
    home = Path(tempfile.mkdtemp(prefix="remoe-evaluate-"))
    log = home / "up.log"
    if deployed.planned:
        if bench.options.hardware is None:
            raise SettingsError("a planned deployment needs --hardware")
        HardwareProfile.load(bench.options.hardware).save(home)
    url = f"http://127.0.0.1:{bench.options.port}"
    before = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "remoe.cli", "up"),
                *("--model-dir", str(deployed.model_dir or bench.options.model_dir)),
                *("--port", str(bench.options.port)),
                *("--remote-ratio", str(deployed.remote_ratio)),
                *("--window", deployed.window, "--main-retention", deployed.main_retention),
                *("--log-level", "warning"),
            ],
            env={
                **os.environ,
                "REMOE_HOME": str(home),
                "REMOE_PLANNER_ADAPT_EVERY_S": f"{_ADAPT_EVERY_S:g}",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(url, process, log)
        yield Platform(f"{url}/v1", home, time.perf_counter() - before)
    finally:
        _stop(process)
        shutil.rmtree(home, ignore_errors=True)


def _check_free(port: int) -> None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise SettingsError(
            f"port {port} is taken ({error.strerror}); end what listens there, or choose another "
            "--port"
        ) from error


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip()
            raise UnavailableError(f"the platform did not start: {said[-600:]}")
        # The first answer means that every service on the way is up.
        try:
            _complete(url, timeout_s=60)
            return
        except urllib.error.HTTPError as error:
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise UnavailableError(f"{url} refused a request: {error.read()!r}") from error
        except OSError:  # nobody listens yet, or took too long
            pass
        time.sleep(_POLL_S)
    raise UnavailableError(f"the platform did not answer within {_START_TIMEOUT_S:g} s")


def _complete(url: str, *, timeout_s: float) -> None:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=timeout_s) as response:  # noqa: S310
        model = json.load(response)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(  # noqa: S310  # our own address
        f"{url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        response.read()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def load(bench: Workbench, running: Platform, config: LoadConfig, name: str) -> RunResult:
    """One run of the load generator against it, in the table's folder.

    UnavailableError if it was stopped before its end: half a run's figures are not a run's.
    """
    from knative.local.run_dir import RunDir
    from remoe.cli.load_probe import LocalPlatformProbe

    folder = bench.folder / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    probe = LocalPlatformProbe(RunDir(running.home))
    config = msgspec.structs.replace(config, url=running.url)
    result = asyncio.run(run_load(config, RunFolder(folder), Load(probe=probe, say=bench.say)))
    if result.target.stopped:
        raise UnavailableError(f"the run {name} was stopped: {result.target.stopped}")
    return result


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a run comes to. `usd` is by the receipts (the papers' ledger: memory and busy time),
    `resident_usd` by all memory that was held meanwhile; both a request's mean."""

    completed: int
    failed: int
    ttft_ms: Distribution
    tpot_ms: Distribution
    e2e_ms: Distribution
    output_tokens: int
    goodput_share: float | None
    usd: float | None
    resident_usd: float | None
    usd_per_million_tokens: float | None
    main_gb_s: float | None
    remote_gb_s: float | None
    held_gb_s: float | None
    idle_share: float | None
    hit_rate: float | None
    remote_calls_per_token: float | None
    cold_starts: int | None


def figures_of(result: RunResult) -> LoadFigures:
    summary = result.summary
    cost, experts, held = summary.cost, summary.experts, summary.platform
    done = max(1, summary.requests.completed)
    return LoadFigures(
        completed=summary.requests.completed,
        failed=summary.requests.planned - summary.requests.completed,
        ttft_ms=summary.latency.ttft_ms,
        tpot_ms=summary.latency.tpot_ms,
        e2e_ms=summary.latency.e2e_ms,
        output_tokens=summary.tokens.output,
        goodput_share=summary.goodput_share,
        usd=cost.per_request_usd.mean if cost else None,
        resident_usd=cost.resident_usd / done if cost and cost.resident_usd is not None else None,
        usd_per_million_tokens=cost.per_million_tokens_usd if cost else None,
        main_gb_s=cost.main_gb_s if cost else None,
        remote_gb_s=cost.remote_gb_s if cost else None,
        held_gb_s=held.resident_gb_s if held else None,
        idle_share=held.idle_share if held else None,
        hit_rate=experts.hit_rate if experts else None,
        remote_calls_per_token=experts.remote_calls_per_token if experts else None,
        cold_starts=held.cold_starts if held else None,
    )
