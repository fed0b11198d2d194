"""Expert functions at zero are woken by a request that asks nothing of them, wherever they listen."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from gateway.background import Background
from gateway.prewarm import Prewarmer
from gateway.upstream import open_upstream
from remoe.topology import socket_url


def test_a_function_is_woken_at_its_port_or_its_socket_and_once_at_a_time(tmp_path: Path) -> None:
    asked: list[str] = []
    answer = asyncio.Event()

    async def serve(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(f"{name} {head.split(b' HTTP')[0].decode()}")
        await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        path, background = tmp_path / "b.sock", Background()
        port = await asyncio.start_server(lambda r, w: serve("a", r, w), "127.0.0.1", 0)
        near = await asyncio.start_unix_server(lambda r, w: serve("b", r, w), path)
        host, number = port.sockets[0].getsockname()[:2]
        urls = {
            "a": f"http://{host}:{number}",
            "b": socket_url(path),
            "gone": socket_url(tmp_path / "no.sock"),
        }
        http: aiohttp.ClientSession
        async with port, near, open_upstream() as http:
            prewarmer = Prewarmer(http, urls, background)
            prewarmer.wake(["a", "b", "gone", "unknown"])
            prewarmer.wake(["b"])
            async with asyncio.timeout(10):
                while len(asked) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                answer.set()
                await background.close(grace_s=5)
            assert sorted(asked) == ["a GET /readyz", "b GET /readyz"]

    asyncio.run(scenario())
