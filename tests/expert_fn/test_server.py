"""A real expert function process, spoken to over its socket."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, MAX_BODY_BYTES, PATH, ExpertFailure, ExpertReply
from remoe.lifecycle import REPLICA_HEADER
from tests.calls import expert_call
from tests.processes import ExpertProcess
from tests.tiny_model import HIDDEN, LAYERS


@pytest.fixture(scope="module")
def function(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExpertProcess]:
    work_dir = tmp_path_factory.mktemp("expert")
    with ExpertProcess(tiny_model_dir, work_dir, last_layer=LAYERS - 1) as process:
        yield process


@pytest.fixture
def connection(function: ExpertProcess) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", function.port, timeout=20)
    yield connection
    connection.close()


def call_body(model_dir: Path) -> bytes:
    hidden = np.ones((2, HIDDEN), np.float32)
    digest = Checkpoint.open(model_dir).digest
    return msgspec.msgpack.encode(expert_call(digest, hidden, {1: [(0, 1.0), (1, 0.0)]}))


def post(
    connection: http.client.HTTPConnection, body: bytes, path: str = PATH
) -> tuple[int, bytes]:
    connection.request("POST", path, body, {"Content-Type": CONTENT_TYPE})
    with connection.getresponse() as response:
        assert response.getheader(REPLICA_HEADER) is not None
        return response.status, response.read()


def test_answers_many_calls_on_one_connection(
    connection: http.client.HTTPConnection, tiny_model_dir: Path
) -> None:
    body = call_body(tiny_model_dir)
    port = None
    for _ in range(3):
        status, answer = post(connection, body)
        reply = msgspec.msgpack.decode(answer, type=ExpertReply)
        partial = np.frombuffer(reply.partial, "<f4").reshape(2, HIDDEN)
        assert status == 200
        assert np.abs(partial[0]).max() > 0
        assert not partial[1].any()  # its gate weight is zero
        assert reply.busy_s > 0
        assert reply.ready_for_s >= 0
        assert connection.sock is not None
        port = port or connection.sock.getsockname()[1]
        assert connection.sock.getsockname()[1] == port


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health(connection: http.client.HTTPConnection, path: str) -> None:
    connection.request("GET", path)
    with connection.getresponse() as response:
        assert (response.status, response.read()) == (200, b"ok\n")


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        (b"not msgpack at all", PATH, 400, "malformed"),
        (b"", PATH, 400, "malformed"),
        (b"x" * (MAX_BODY_BYTES + 1), PATH, 413, "body_too_large"),
        (b"", "/elsewhere", 404, "malformed"),
    ],
)
def test_bad_requests_get_a_typed_failure_and_keep_the_connection(
    connection: http.client.HTTPConnection,
    tiny_model_dir: Path,
    body: bytes,
    path: str,
    status: int,
    code: str,
) -> None:
    got, answer = post(connection, body, path)
    failure = msgspec.msgpack.decode(answer, type=ExpertFailure)
    assert (got, failure.code) == (status, code)
    assert post(connection, call_body(tiny_model_dir))[0] == 200


def test_wrong_method(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", PATH)
    with connection.getresponse() as response:
        assert response.status == 405


def test_something_that_is_not_http_is_answered_and_closed(function: ExpertProcess) -> None:
    with socket.create_connection(("127.0.0.1", function.port), timeout=10) as raw:
        raw.sendall(b"\x00\x01\x02 hello\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
        while raw.recv(4096):
            pass


def test_sigterm_exits_cleanly_and_the_address_holds_the_next_call(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=0) as function:
        connection = http.client.HTTPConnection("127.0.0.1", function.port, timeout=20)
        body = call_body(tiny_model_dir)
        assert post(connection, body)[0] == 200
        assert function.terminate() == 0
        connection.close()
        late = http.client.HTTPConnection("127.0.0.1", function.port, timeout=20)
        late.request("POST", PATH, body, {"Content-Type": CONTENT_TYPE})  # nobody is there yet
        function.start()
        with late.getresponse() as response:
            assert response.status == 200
        late.close()


def test_a_reply_names_its_replica(connection: http.client.HTTPConnection) -> None:
    names = set()
    for path in ("/readyz", "/elsewhere", "/readyz"):
        connection.request("GET", path)
        with connection.getresponse() as response:
            names.add(response.getheader(REPLICA_HEADER))
            response.read()
    assert len(names) == 1


def test_who_does_not_read_its_answers_holds_up_nobody(
    function: ExpertProcess, connection: http.client.HTTPConnection, tiny_model_dir: Path
) -> None:
    hidden = np.ones((4000, HIDDEN), np.float32)  # half a megabyte each way
    digest = Checkpoint.open(tiny_model_dir).digest
    body = msgspec.msgpack.encode(expert_call(digest, hidden, {1: [(0, 1.0)]}))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", function.port), timeout=10) as deaf:
        deaf.setblocking(False)
        sent, request = 0, (head + body) * 40
        with contextlib.suppress(BlockingIOError):
            while sent < len(request):
                sent += deaf.send(request[sent:])
        assert post(connection, call_body(tiny_model_dir))[0] == 200
        deaf.setblocking(True)  # all of it is still to be had, in order
        deaf.settimeout(20)
        sender = threading.Thread(target=deaf.sendall, args=(request[sent:],))
        sender.start()
        got = 0
        with deaf.makefile("rb") as answers:
            for _ in range(40):
                assert answers.readline().split()[1] == b"200"
                length = 0
                while (line := answers.readline()) != b"\r\n":
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                got += len(answers.read(length))
        sender.join(timeout=5)
        assert got > 40 * hidden.nbytes


def test_sigterm_waits_for_a_call_that_is_still_arriving(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    body = call_body(tiny_model_dir)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=0) as function:
        with socket.create_connection(("127.0.0.1", function.port), timeout=20) as client:
            client.sendall(head + body)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(head + body[:10])
            function.process.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                function.process.wait(timeout=0.3)
            client.sendall(body[10:])
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            assert client.recv(65536) == b""
        assert function.process.wait(timeout=5) == 0


def test_an_upgrade_is_not_followed(function: ExpertProcess) -> None:
    with socket.create_connection(("127.0.0.1", function.port), timeout=10) as client:
        client.sendall(
            b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1")
    with socket.create_connection(("127.0.0.1", function.port), timeout=10) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert b"connection: close" in answer
        assert answer.endswith(b"ok\n")
