"""Processes that start, report, serve, drain and die as `remoe.lifecycle` promises."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from remoe.lifecycle import READY_FOR_HEADER, InFlight, Notifier, bind
from remoe.notify import BUSY_S, IN_FLIGHT, REQUESTS

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Inbox:
    """A NOTIFY_SOCKET that a test reads."""

    socket: socket.socket
    address: str

    def next(self) -> dict[str, str]:
        pairs = (line.partition("=") for line in self.socket.recv(4096).decode().splitlines())
        return {name: value for name, _, value in pairs}

    def until(self, name: str, value: str) -> dict[str, str]:
        while True:
            fields = self.next()
            if fields.get(name) == value:
                return fields


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(_DEADLINE_S)
        yield Inbox(receiver, address)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@contextlib.contextmanager
def serving(
    listener: socket.socket, inbox: Inbox, *, lifeline: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The toy service on an inherited socket, handed down by a shell-like launcher."""
    env = {**os.environ, "NOTIFY_SOCKET": inbox.address, "REMOE_NOTIFY_INTERVAL_S": "0.05"}
    fds = [listener.fileno()]
    if lifeline is not None:
        env["REMOE_LIFELINE_FD"] = str(lifeline)
        fds.append(lifeline)
    launch = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_FDS'] = '1'; "
        "os.environ['LISTEN_PID'] = str(os.getpid()); "
        "os.execv(sys.executable, [sys.executable, '-m', 'tests.knative.toy_service'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launch, str(listener.fileno())], env=env, pass_fds=fds, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address_of(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()
    return host, port


def ask(listener: socket.socket, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*address_of(listener), timeout=_DEADLINE_S)
    connection.request("GET", path, headers={"connection": "close"})
    return connection.getresponse()


def test_it_serves_the_inherited_socket_and_reports(listener: socket.socket, inbox: Inbox) -> None:
    with serving(listener, inbox) as process:
        assert inbox.next() == {"READY": "1"}
        with ask(listener, "/stream?count=4&pause=0.1") as response:
            assert float(response.headers[READY_FOR_HEADER]) > 0
            running = inbox.until(IN_FLIGHT, "1")
            assert running[REQUESTS] == "1"
            assert len(response.read().splitlines()) == 4
        done = inbox.until(IN_FLIGHT, "0")
        assert 0.3 < float(done[BUSY_S]) < 2.0
        process.terminate()
        inbox.until("STOPPING", "1")
        assert process.wait(timeout=_DEADLINE_S) == 0


def test_a_connection_made_before_the_start_is_answered_and_sees_it_was_cold(
    listener: socket.socket, inbox: Inbox
) -> None:
    began = time.monotonic()
    connection = http.client.HTTPConnection(*address_of(listener), timeout=_DEADLINE_S)
    connection.request("GET", "/pid")
    with serving(listener, inbox):
        response = connection.getresponse()
        waited_ms = (time.monotonic() - began) * 1e3
        assert response.status == 200
        assert float(response.headers[READY_FOR_HEADER]) < waited_ms
    connection.close()


def test_sigterm_finishes_the_stream_and_leaves_new_connections_to_others(
    listener: socket.socket, inbox: Inbox
) -> None:
    with serving(listener, inbox) as process:
        inbox.until("READY", "1")
        with ask(listener, "/stream?count=8&pause=0.1") as response:
            process.terminate()
            inbox.until("STOPPING", "1")
            time.sleep(0.1)
            with socket.create_connection(listener.getsockname(), timeout=1) as late:
                assert len(response.read().splitlines()) == 8
                assert process.wait(timeout=_DEADLINE_S) == 0
                # Nobody accepted it: it is still in the backlog, for the next replica.
                listener.settimeout(1)
                accepted, address = listener.accept()
                accepted.close()
                assert address == late.getsockname()


def test_sigterm_during_loading_ends_it_at_once(listener: socket.socket, inbox: Inbox) -> None:
    with serving(listener, inbox) as process:
        process.terminate()
        assert process.wait(timeout=_DEADLINE_S) in {0, -signal.SIGTERM}


def test_the_lifeline_ends_it(listener: socket.socket, inbox: Inbox) -> None:
    read_end, write_end = os.pipe()
    with serving(listener, inbox, lifeline=read_end) as process:
        os.close(read_end)
        inbox.until("READY", "1")
        assert process.poll() is None
        os.close(write_end)
        assert process.wait(timeout=_DEADLINE_S) == 0


def test_bind_takes_port_and_ignores_what_is_meant_for_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("PORT", "0")
    with bind() as bound:
        assert bound.getsockname()[0] == "0.0.0.0"  # noqa: S104
        assert "LISTEN_FDS" not in os.environ  # nor is it for our children


def test_bind_names_a_bad_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    monkeypatch.setenv("PORT", "http")
    with pytest.raises(SystemExit, match="PORT"):
        bind()


def test_nobody_listening_hurts_no_one() -> None:
    for notifier in (Notifier(None), Notifier("/nonexistent/socket"), Notifier("@remoe-nobody")):
        assert notifier.ready_for_s == 0
        notifier.ready()
        notifier.status("loading")
        assert notifier.ready_for_s > 0
        notifier.close()


def test_short_requests_between_reports_all_count(inbox: Inbox) -> None:
    notifier = Notifier(inbox.address)
    in_flight = InFlight(notifier, interval_s=0.02)
    for _ in range(50):
        with in_flight.request():
            pass
    in_flight.close()
    notifier.close()
    reports = [inbox.next()]
    while reports[-1][REQUESTS] != "50":
        reports.append(inbox.next())
    assert reports[-1][IN_FLIGHT] == "0"
    counts = [int(report[REQUESTS]) for report in reports]
    assert counts == sorted(counts)
    assert in_flight.total == 50


def test_an_idle_replica_is_silent(inbox: Inbox) -> None:
    notifier = Notifier(inbox.address)
    in_flight = InFlight(notifier, interval_s=0.01)
    with in_flight.request():
        assert inbox.next()[IN_FLIGHT] == "1"
    inbox.until(IN_FLIGHT, "0")
    inbox.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        inbox.next()
    in_flight.close()
    notifier.close()


def test_sigterm_ends_a_containers_first_process_while_it_still_imports() -> None:
    isolated = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*isolated, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no process namespaces here: unshare is missing or not allowed")
    program = """
import os, time
from remoe.lifecycle import watch_lifeline
assert os.getpid() == 1
watch_lifeline()
print(flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [*isolated, sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT
    ) as outer:
        try:
            assert outer.stdout is not None
            outer.stdout.readline()
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            os.kill(int(children.read_text(encoding="ascii")), signal.SIGTERM)
            assert outer.wait(timeout=_DEADLINE_S) == 0
        finally:
            outer.kill()
