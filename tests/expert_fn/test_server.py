"""A real expert function process, spoken to over its socket."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from remoe.checkpoint import Checkpoint
from remoe.expert_call import CONTENT_TYPE, MAX_BODY_BYTES, PATH, ExpertFailure, ExpertReply
from remoe.lifecycle import READY_FOR_HEADER
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
        assert response.getheader(READY_FOR_HEADER) is not None
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
