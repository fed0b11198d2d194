"""Requests begin when they are read, whatever else the event loop has to do."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from remoe.eager import start_now
from remoe.http_protocol import ServerProtocol

_said: contextvars.ContextVar[str] = contextvars.ContextVar("said", default="")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def runs(main: Any) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main)

    return runs


def test_a_task_begins_at_once_and_goes_on_as_any_other(run: Callable[..., Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        noted: list[object] = []
        done = loop.create_future()

        async def work() -> int:
            _said.set("inside")
            noted.append(asyncio.current_task())
            async with asyncio.timeout(10):
                await asyncio.sleep(0)
            noted.append(_said.get())
            return 7

        def callback() -> None:
            loop.call_soon(noted.append, "was there first")
            task = start_now(loop, work())
            assert noted == [task]
            task.add_done_callback(done.set_result)

        loop.call_soon(callback)
        assert (await done).result() == 7
        assert noted[1:] == ["was there first", "inside"]
        assert _said.get() == ""

    run(main())


def test_what_breaks_in_the_first_step_is_the_task_s(run: Callable[..., Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        made = loop.create_future()

        async def work() -> None:
            raise ValueError("at once")

        loop.call_soon(lambda: made.set_result(start_now(loop, work())))
        with pytest.raises(ValueError, match="at once"):
            await (await made)

    run(main())


def test_within_a_task_it_starts_as_any_other(run: Callable[..., Any]) -> None:
    async def main() -> None:
        begun = []

        async def work() -> None:
            begun.append(True)

        task = start_now(asyncio.get_running_loop(), work())
        assert not begun
        await task
        assert begun

    run(main())


def test_a_request_begins_with_its_body_and_its_answer_leaves(run: Callable[..., Any]) -> None:
    """Before the reading callback returns: nothing else the loop has to do comes first."""
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        order.append(f"{scope['path']} {message['body'].decode()} {message['more_body']}")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    class Noting(ServerProtocol):
        def data_received(self, data: bytes) -> None:
            self.loop.call_soon(order.append, "other work")
            super().data_received(data)
            order.append(f"left {self.transport.get_write_buffer_size()}")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await loop.connect_accepted_socket(
            lambda: Noting(config, ServerState(), {}), ours
        )
        request = b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nyes"
        for number in (1, 2):
            await loop.sock_sendall(theirs, request % number)
            reply = b""
            while not reply.endswith(b"0\r\n\r\n"):
                reply += await loop.sock_recv(theirs, 10_000)
            assert b"hello" in reply
        transport.close()
        theirs.close()
        await asyncio.sleep(0)

    run(main())
    assert order == [
        *("/1 yes False", "left 0", "other work"),
        *("/2 yes False", "left 0", "other work"),
    ]
