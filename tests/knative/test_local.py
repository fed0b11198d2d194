"""The local runtime with real processes: wake, sleep, drain, break, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from knative.local.control import ask_status, ask_stop
from knative.local.run_dir import RunDir
from remoe.errors import SettingsError, UnavailableError
from remoe.lifecycle import READY_FOR_HEADER
from tests.knative.toy import FAST, ROOT, get, get_by_socket, status_of, supervise, toy_spec, until


def test_a_request_at_zero_is_held_and_answered_and_the_function_sleeps_again(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            assert status_of(supervisor).state == "zero"
            reply = await get(f"{supervisor.url}/pid")
            assert reply.status_code == 200
            awake = status_of(supervisor)
            assert awake.state == "ready"
            assert awake.replicas[0].pid == reply.json()["pid"]
            assert awake.cold_starts == 1
            assert awake.cold_start_last_ms is not None
            # It was ready only just before it answered, so the caller can tell that it waited.
            assert float(reply.headers[READY_FOR_HEADER]) < awake.cold_start_last_ms + 1000
            await until(lambda: status_of(supervisor).state == "zero")
            asleep = status_of(supervisor)
            assert (asleep.ready, asleep.desired, asleep.crashes) == (0, 0, 0)
            assert asleep.requests == 1
            again = await get(f"{supervisor.url}/pid")
            assert again.json()["pid"] != reply.json()["pid"]
            kinds = [event.kind for event in supervisor.status().events]
            assert kinds == ["cold_start", "scaled_to_zero", "cold_start"]

    asyncio.run(scenario())


def test_a_long_request_keeps_its_replica_awake(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            # Three windows long, with nothing else to count.
            reply = await get(f"{supervisor.url}/stream?count=6&pause=0.2")
            assert len(reply.text.splitlines()) == 6
            assert [e.kind for e in supervisor.status().events] == ["cold_start"]

    asyncio.run(scenario())


def test_kill_9_in_the_middle_of_a_request_brings_a_new_replica(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            first = (await get(f"{supervisor.url}/pid")).json()["pid"]
            running = asyncio.create_task(get(f"{supervisor.url}/stream?count=100&pause=0.05"))
            await until(lambda: status_of(supervisor).in_flight == 1)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                await running
            second = (await get(f"{supervisor.url}/pid")).json()["pid"]
            assert second != first
            status = status_of(supervisor)
            assert (status.crashes, status.restarts, status.refused) == (1, 1, 0)
            crash = next(e for e in supervisor.status().events if e.kind == "crash")
            assert "SIGKILL" in crash.text
            log = RunDir(tmp_path).log("toy").read_text()
            assert "runtime | crash: toy-r1 was killed by SIGKILL" in log

    asyncio.run(scenario())


def test_a_crash_loop_answers_503_and_recovers(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.touch()

    async def scenario() -> None:
        spec = toy_spec(env={"TOY_FAIL_WHILE_EXISTS": str(trap)})
        async with supervise(tmp_path, spec) as supervisor:
            reply = await get(f"{supervisor.url}/pid")
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "model_loading")
            assert "the toy refuses to start" in error["message"]
            status = status_of(supervisor)
            assert status.crashes >= FAST.failures_until_refusal
            assert status.refused == 1
            assert status.state in {"backing off", "starting"}
            trap.unlink()
            # Demand goes on, so it is tried again; nobody has to do anything.
            async with asyncio.timeout(10):
                while (await get(f"{supervisor.url}/pid")).status_code == 503:
                    pass
            assert status_of(supervisor).state == "ready"

    asyncio.run(scenario())


def test_a_function_with_a_local_socket_is_woken_and_refused_as_at_a_port(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    async def scenario() -> None:
        spec = toy_spec("near", env={"TOY_FAIL_WHILE_EXISTS": str(trap)}, local_socket=True)
        async with supervise(tmp_path, toy_spec(), spec) as supervisor:
            url = supervisor.functions["near"].url
            assert url.startswith(f"unix://{tmp_path}/run/")
            assert status_of(supervisor, "near").url == url
            first = (await get_by_socket(url, "/pid")).json()["pid"]
            await until(lambda: status_of(supervisor, "near").state == "zero")
            trap.touch()
            reply = await get_by_socket(url, "/pid")
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "model_loading"
            trap.unlink()
            while (reply := await get_by_socket(url, "/pid")).status_code == 503:
                pass
            assert reply.json()["pid"] != first

    asyncio.run(scenario())


def test_a_start_that_takes_too_long_answers_503(tmp_path: Path) -> None:
    async def scenario() -> None:
        options = replace(FAST, progress_deadline_s=0.02)
        async with supervise(tmp_path, options=options) as supervisor:
            reply = await get(f"{supervisor.url}/pid")
            assert reply.status_code == 503
            assert "not ready within 0.02 s" in reply.json()["error"]["message"]

    asyncio.run(scenario())


def test_sigterm_lets_a_stream_finish_and_a_new_request_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            first = (await get(f"{supervisor.url}/pid")).json()["pid"]
            running = asyncio.create_task(get(f"{supervisor.url}/stream?count=8&pause=0.1"))
            await until(lambda: status_of(supervisor).in_flight == 1)
            os.kill(first, signal.SIGTERM)
            await until(lambda: status_of(supervisor).replicas[0].state == "draining")
            # The draining replica accepts no more; the socket stays, so this waits for the next.
            later = await get(f"{supervisor.url}/pid")
            assert later.json()["pid"] != first
            lines = (await running).text.splitlines()
            assert lines == [f"{first} {index}" for index in range(8)]
            await until(lambda: first not in {r.pid for r in status_of(supervisor).replicas})
            assert status_of(supervisor).crashes == 0

    asyncio.run(scenario())


def test_two_replicas_share_the_socket_up_to_max_scale(tmp_path: Path) -> None:
    async def scenario() -> None:
        spec = toy_spec(container_concurrency=1, max_scale="2")
        options = replace(FAST, window_s=1.0)
        async with supervise(tmp_path, spec, options=options) as supervisor:
            await get(f"{supervisor.url}/pid")
            load = [
                asyncio.create_task(get(f"{supervisor.url}/stream?count=12&pause=0.1"))
                for _ in range(4)
            ]
            await until(lambda: status_of(supervisor).ready == 2)
            seen: set[int] = set()
            async with asyncio.timeout(10):
                while len(seen) < 2:
                    replies = await asyncio.gather(
                        *(get(f"{supervisor.url}/pid") for _ in range(4))
                    )
                    seen |= {reply.json()["pid"] for reply in replies}
            await asyncio.gather(*load)
            status = status_of(supervisor)
            assert status.desired <= 2
            assert status.crashes == 0
            await until(lambda: status_of(supervisor).state == "zero")

    asyncio.run(scenario())


def test_a_replica_over_its_memory_limit_is_killed_and_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path, toy_spec(memory_mib=150)) as supervisor:
            await get(f"{supervisor.url}/pid")
            assert 0 < status_of(supervisor).memory_bytes < 150 << 20
            with pytest.raises(httpx.RemoteProtocolError):
                await asyncio.gather(
                    get(f"{supervisor.url}/stream?count=100&pause=0.1"),
                    get(f"{supervisor.url}/grow?mib=200"),
                )
            await until(lambda: status_of(supervisor).crashes == 1)
            assert status_of(supervisor).memory_kills == 1
            kill = next(e for e in supervisor.status().events if e.kind == "memory_kill")
            assert "its limit is 150 MiB" in kill.text
            assert (await get(f"{supervisor.url}/pid")).status_code == 200

    asyncio.run(scenario())


def test_stopping_frees_the_port_and_removes_the_run_directory(tmp_path: Path) -> None:
    async def scenario() -> None:
        logs = tmp_path / "kept"
        supervisor = supervise(tmp_path, toy_spec(min_scale="1", initial_scale="1"))
        supervisor._keep_logs = logs
        async with supervisor:
            assert await supervisor.wait_ready("toy")
            port = urlsplit(supervisor.url).port
            replica = status_of(supervisor).replicas[0].pid
            running = asyncio.create_task(get(f"{supervisor.url}/stream?count=5&pause=0.05"))
            await until(lambda: status_of(supervisor).in_flight == 1)
        assert len((await running).text.splitlines()) == 5
        assert not psutil.pid_exists(replica)
        assert not (tmp_path / "run").exists()
        assert (logs / "toy.log").exists()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            assert port is not None
            probe.bind(("127.0.0.1", port))

    asyncio.run(scenario())


def test_a_taken_port_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(SettingsError, match=rf"port {port}: .*--port"):
                async with supervise(tmp_path, port=port):
                    pass
        assert not (tmp_path / "run").exists()

    asyncio.run(scenario())


def test_a_second_supervisor_is_refused_and_the_control_socket_stops_the_first(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(tmp_path)

    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            with pytest.raises(SettingsError, match=r"running already .*remoe down"):
                async with supervise(tmp_path):
                    pass
            assert run_dir.running_pid() == os.getpid()
            told = await asyncio.to_thread(ask_status, run_dir.control)
            assert [function.name for function in told.functions] == ["toy"]
            down = asyncio.create_task(asyncio.to_thread(ask_stop, run_dir.control, timeout_s=10))
            async with asyncio.timeout(5):
                await supervisor.wait_stopping()
        await down
        assert run_dir.running_pid() is None
        with pytest.raises(UnavailableError, match="remoe up"):
            ask_status(run_dir.control)

    asyncio.run(scenario())


def test_kill_9_of_the_supervisor_leaves_no_orphan_and_the_next_start_cleans_up(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.knative.toy", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as supervisor:
        assert supervisor.stdout is not None
        orphan = psutil.Process(int(supervisor.stdout.readline()))
        supervisor.kill()
    orphan.wait(timeout=10)
    assert (tmp_path / "run" / "control.sock").exists()
    with pytest.raises(UnavailableError, match="not running"):
        ask_status(RunDir(tmp_path).control)

    async def scenario() -> None:
        async with supervise(tmp_path) as again:
            assert (await get(f"{again.url}/pid")).status_code == 200

    asyncio.run(scenario())


def test_a_function_is_started_and_let_go_when_somebody_asks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervise(tmp_path) as supervisor:
            spec = supervisor.status().functions[0]
            assert supervisor.scale(spec.name, 1, 60)
            await until(lambda: status_of(supervisor).state == "ready")
            await get(f"{supervisor.url}/pid")
            assert supervisor.scale(spec.name, 0, 60)
            await until(lambda: status_of(supervisor).state == "zero")
            assert not supervisor.scale("nobody", 1, 60)
            assert (await get(f"{supervisor.url}/pid")).status_code == 200

    asyncio.run(scenario())
