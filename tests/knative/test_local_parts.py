"""The runtime's small parts on their own: logs, process exits, who may report, the run directory."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from knative.local import function_log
from knative.local.function_log import FunctionLog, LogPipe
from knative.local.inbox import Inbox
from knative.local.process import Process, describe_exit
from knative.local.run_dir import RunDir
from remoe.errors import SettingsError
from tests.knative.toy import until


def test_output_is_prefixed_line_by_line_however_it_is_cut(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = FunctionLog(tmp_path / "f.log")
        pipe = LogPipe(log, "f-r1")
        for part in (b"one\ntw", b"o\n\n", b"no newline at the end"):
            os.write(pipe.write_fd, part)
            await asyncio.sleep(0.01)
        pipe.close_write()
        pipe.finish()
        log.close()
        assert pipe.last_line == "no newline at the end"

    asyncio.run(scenario())
    assert (tmp_path / "f.log").read_text().splitlines() == [
        "f-r1 | one",
        "f-r1 | two",
        "f-r1 | ",
        "f-r1 | no newline at the end",
    ]


def test_a_full_log_moves_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_log, "_MOST_BYTES", 100)
    log = FunctionLog(tmp_path / "f.log")
    for index in range(9):
        log.write("r", f"line {index} of twenty-odd bytes".encode())
    log.close()
    kept = (tmp_path / "f.log.1").read_text() + (tmp_path / "f.log").read_text()
    assert kept.splitlines()[-1].startswith("r | line 8")
    assert (tmp_path / "f.log").stat().st_size < 150


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit(7)", "exited with status 7"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_how_a_process_ended_is_told(code: str, says: str) -> None:
    async def scenario() -> int:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        Process([sys.executable, "-c", code], env={}, fds={}, on_exit=ended.set_result)
        return await asyncio.wait_for(ended, 10)

    assert describe_exit(asyncio.run(scenario())) == says


def test_a_killed_process_takes_its_children_along() -> None:
    grandchild = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'])"
    program = f"{grandchild}; print(1, flush=True); import time; time.sleep(60)"

    async def scenario() -> None:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        read_end, write_end = os.pipe()
        process = Process(
            [sys.executable, "-c", program],
            env={},
            fds={1: write_end},
            on_exit=ended.set_result,
        )
        os.close(write_end)
        with os.fdopen(read_end, "rb") as output:
            assert await asyncio.to_thread(output.readline) == b"1\n"
            process.kill()
            await asyncio.wait_for(ended, 10)
            # The grandchild held the other end of this pipe; now nobody does.
            assert await asyncio.wait_for(asyncio.to_thread(output.read), 10) == b""

    asyncio.run(scenario())


def test_the_inbox_knows_who_sent_what() -> None:
    heard: list[tuple[int, Mapping[str, str]]] = []

    async def scenario() -> None:
        inbox = Inbox(lambda pid, fields: heard.append((pid, fields)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect("\0" + inbox.address[1:])
            sender.send(b"READY=1\nSTATUS=a=b")
        send = "import os; from remoe.notify import Notifier; Notifier.from_environment().ready()"
        env = {**os.environ, "NOTIFY_SOCKET": inbox.address}
        await asyncio.to_thread(
            subprocess.run, [sys.executable, "-W", "ignore", "-c", send], env=env, check=True
        )
        await until(lambda: len(heard) == 2)
        inbox.close()

    asyncio.run(scenario())
    assert heard[0] == (os.getpid(), {"READY": "1", "STATUS": "a=b"})
    assert heard[1][0] != os.getpid()
    assert heard[1][1] == {"READY": "1"}


def test_a_run_directory_whose_path_holds_no_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="REMOE_HOME to a shorter path"):
        RunDir(tmp_path / ("x" * 120)).acquire()


def test_what_a_killed_run_left_is_cleaned(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir(parents=True)
    (run_dir.logs / "old.log").touch()
    run_dir.topology.touch()
    assert run_dir.running_pid() is None
    assert run_dir.acquire()
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["lock", "logs"]
    assert list(run_dir.logs.iterdir()) == []
    assert run_dir.running_pid() == os.getpid()
    run_dir.release()
    assert not run_dir.path.exists()
