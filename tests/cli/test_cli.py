"""The command line: what a user reads, and that a mistake is one line and a status."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from knative.local.run_dir import RunDir
from remoe import __version__
from remoe.cli import app
from remoe.cli.logs import matching_logs
from remoe.cli.status import status_table
from remoe.errors import SettingsError
from remoe.runtime_status import FunctionStatus, ReplicaStatus, RuntimeStatus
from tests.knative.toy import get, supervise, toy_spec

Remoe = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def remoe(home: Path) -> Remoe:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


@contextlib.contextmanager
def platform(home: Path) -> Iterator[str]:
    """A supervisor with two toys, one of them called once, in another thread; yields its URL."""
    started, stop = Event(), Event()
    urls: list[str] = []

    async def run() -> None:
        async with supervise(home, toy_spec("gateway"), toy_spec("experts-l00-l04")) as supervisor:
            await get(f"{supervisor.url}/pid")
            urls.append(supervisor.url)
            started.set()
            asked = asyncio.create_task(supervisor.wait_stopping())
            while not asked.done() and not stop.is_set():
                await asyncio.wait({asked}, timeout=0.02)
            asked.cancel()

    thread = Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(20)
        yield urls[0]
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("command", [["status"], ["logs"], ["down"]])
def test_without_a_platform_each_command_says_how_to_start_it(
    remoe: Remoe, command: list[str]
) -> None:
    result = remoe(*command)
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "not running" in result.output
    assert "remoe up" in result.output


def test_status_shows_each_function_as_a_table_and_as_json(remoe: Remoe, home: Path) -> None:
    with platform(home) as url:
        table = remoe("status", "--once").output
        told = msgspec.json.decode(remoe("status", "--json").output, type=RuntimeStatus)
    assert url in table
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert "1 (" in rows["gateway"]
    assert "zero" in rows["experts-l00-l04"]
    assert [function.name for function in told.functions] == ["gateway", "experts-l00-l04"]
    assert told.functions[0].cold_starts == 1


def test_logs_show_one_function_or_all(remoe: Remoe, home: Path) -> None:
    with platform(home):
        assert "gateway-r1 | the toy starts" in remoe("logs").output
        assert remoe("logs", "l00").output == ""
        unknown = remoe("logs", "nobody")
        limited = remoe("logs", "gateway", "-n", "1").output
    assert unknown.exit_code == 1
    assert "there are experts-l00-l04, gateway" in unknown.output
    assert len(limited.splitlines()) == 1


def test_an_exact_name_wins_over_names_that_contain_it(tmp_path: Path) -> None:
    for name in ("main", "main-two"):
        (tmp_path / f"{name}.log").touch()
    assert [path.stem for path in matching_logs(tmp_path, "main")] == ["main"]
    assert [path.stem for path in matching_logs(tmp_path, "ai")] == ["main", "main-two"]
    with pytest.raises(SettingsError, match="there are main, main-two"):
        matching_logs(tmp_path, "x")


def test_down_returns_when_everything_has_stopped(remoe: Remoe, home: Path) -> None:
    with platform(home):
        result = remoe("down")
        assert result.exit_code == 0
        assert not (home / "run").exists()
    assert "stopped" in result.output


def test_a_second_up_is_refused_before_anything_is_built(remoe: Remoe, home: Path) -> None:
    with platform(home):
        result = remoe("up")
    assert result.exit_code == 1
    assert f"running already (process {os.getpid()})" in result.output
    assert "remoe down" in result.output
    assert not (home / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--window", "soon"], "60s"),
        (["--window", "1s"], "6s to 1h"),
        (["--main-retention", "2h"], "0s to 1h"),
    ],
)
def test_up_refuses_bad_settings_in_one_line(
    remoe: Remoe, tiny_model_dir: Path, arguments: list[str], says: str
) -> None:
    result = remoe("up", "--model-dir", str(tiny_model_dir), *arguments)
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert says in result.output


def test_up_refuses_a_folder_without_a_model(remoe: Remoe, tmp_path: Path) -> None:
    result = remoe("up", "--model-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "remoe model build" in result.output


def test_a_taken_port_is_named_before_anything_is_built(remoe: Remoe, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = remoe("up", "--port", str(port))
    assert result.exit_code == 1
    assert f"port {port}: address already in use. Choose another with --port" in result.output
    assert list(home.iterdir()) == []


def test_a_file_error_is_one_line(remoe: Remoe, home: Path) -> None:
    (home / "file").touch()
    result = remoe("model", "build", "--cache-dir", str(home / "file" / "below"))
    assert result.exit_code == 1
    assert result.output.strip().startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(("width", "fits"), [(80, False), (100, False), (160, True)])
def test_the_table_fits_the_terminal(width: int, fits: bool) -> None:
    function = FunctionStatus(
        name="smollm2-8x135m-experts-l00-l04",
        holds="layers 0-4, 40 experts",
        url="http://127.0.0.1:1",
        state="ready",
        detail="",
        desired=2,
        ready=1,
        in_flight=0,
        requests=6000,
        last_call_s=75.0,
        memory_bytes=238 << 20,
        mapped_bytes=124 << 20,
        memory_limit_bytes=640 << 20,
        cold_starts=12,
        cold_start_last_ms=1926.3,
        cold_start_total_ms=9000.0,
        crashes=1,
        restarts=1,
        memory_kills=0,
        refused=0,
        replicas=[
            ReplicaStatus(
                name="r1",
                pid=1,
                state="ready",
                age_s=1,
                in_flight=0,
                memory_bytes=238 << 20,
                mapped_bytes=124 << 20,
            )
        ],
    )
    current = RuntimeStatus(
        pid=1,
        url="http://127.0.0.1:8000",
        model="smollm2-8x135m",
        up_s=3700,
        functions=[function],
        events=[],
    )
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status_table(current, width))
    row = console.export_text().splitlines()[2]
    for cell in ("experts-l00-l04", "1/2", "238 + 124", "12 (1926 ms)", "1 min 15 s"):
        assert cell in row
    assert row.rstrip().endswith("ready  1 crash")
    assert ("layers 0-4" in row) is fits


def test_version_is_the_packages(remoe: Remoe) -> None:
    assert remoe("version").output.strip() == __version__


def test_help_is_quick_and_imports_no_service() -> None:
    began = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "remoe.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - began < 5
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert "remoe.cli.up" in imported
    assert not imported & {"torch", "numpy", "msgspec", "psutil", "knative", "models", "uvicorn"}
    for command in ("up", "status", "logs", "down", "model", "version"):
        assert command in shown.stdout


def test_ctrl_c_during_start_up_leaves_nothing(home: Path, tiny_model_dir: Path) -> None:
    command = [sys.executable, "-m", "remoe.cli", "up", "--model-dir", str(tiny_model_dir)]
    command += ["--port", "1"] if os.geteuid() else ["--port", "65431"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        assert "Starting gateway, planner" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=20) == 0
    assert "none left" in rest
    assert not RunDir(home).path.exists()
