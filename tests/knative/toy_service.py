"""A small service with bad habits, for the runtime's tests: `python -m tests.knative.toy_service`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from remoe.lifecycle import serve_asgi, watch_lifeline

hoard: list[bytearray] = []


async def pid(request: Request) -> Response:
    return JSONResponse({"pid": os.getpid()})


async def stream(request: Request) -> Response:
    """`count` lines with `pause` seconds in front of each."""
    count = int(request.query_params["count"])
    pause_s = float(request.query_params["pause"])

    async def lines() -> AsyncIterator[str]:
        for index in range(count):
            await asyncio.sleep(pause_s)
            yield f"{os.getpid()} {index}\n"

    return StreamingResponse(lines())


async def grow(request: Request) -> Response:
    hoard.append(bytearray(b"x" * (int(request.query_params["mib"]) << 20)))
    return JSONResponse({"pid": os.getpid()})


def main() -> None:
    watch_lifeline()
    trap = os.environ.get("TOY_FAIL_WHILE_EXISTS")
    if trap and Path(trap).exists():
        sys.exit("the toy refuses to start")
    sys.stderr.write("the toy starts\n")
    routes = [Route("/pid", pid), Route("/stream", stream), Route("/grow", grow)]
    serve_asgi(Starlette(routes=routes), log_level="info")


if __name__ == "__main__":
    main()
