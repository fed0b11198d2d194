"""The program itself, as the runtime starts it: settings in the environment, a socket handed down."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys

import httpx
import msgspec
import numpy as np

from remoe.plan import Plan
from tests.planner.worlds import World, ask, history_arrays, save_arrays

START_LIMIT_S = 30


def environment(world: World, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REMOE_")}
    return kept | {"REMOE_TOPOLOGY": str(world.topology_path)} | changes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_the_program_serves_and_stops_on_sigterm(world: World) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "planner"],
        env=environment(world, PORT=str(port), REMOE_PLANNER_HISTORY=str(world.history_file(20))),
        stderr=subprocess.PIPE,
    )
    try:
        transport = httpx.HTTPTransport(retries=8)  # 0.5 s, 1 s, ...: until it listens
        with httpx.Client(
            transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=START_LIMIT_S
        ) as client:
            response = client.post("/v1/plan", content=msgspec.json.encode(ask([1, 2])))
            assert len(msgspec.json.decode(response.content, type=Plan).neighbours) == 15
        process.send_signal(signal.SIGTERM)
        _, logs = process.communicate(timeout=START_LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, logs
    assert b'"event": "history_loaded"' in logs


def refusal(world: World, **changes: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "planner"],
        env=environment(world, **changes),
        capture_output=True,
        timeout=START_LIMIT_S,
        check=False,
    )
    assert done.returncode != 0
    error = done.stderr.decode()
    assert "Traceback" not in error
    return error


def test_bad_settings_end_the_program_with_a_sentence(world: World) -> None:
    error = refusal(world, REMOE_PLANNER_REMOTE_RATIO="1.5", REMOE_PLANNER_NEIGHBOURS="many")
    assert "REMOE_PLANNER_REMOTE_RATIO" in error
    assert "REMOE_PLANNER_NEIGHBOURS" in error


def test_another_models_history_ends_the_program_with_a_sentence(world: World) -> None:
    arrays = history_arrays(world.model, 3) | {"model_digest": np.array("sha256:other")}
    path = save_arrays(world.folder / "other.npz", arrays)
    assert "sha256:other" in refusal(world, REMOE_PLANNER_HISTORY=str(path))


def test_a_full_disk_stops_observations_and_nothing_else(world: World) -> None:
    """The kernel refuses every write beyond a file size, as a full disk would, until told not to."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "planner"],
        env=environment(
            world,
            PORT=str(port),
            REMOE_PLANNER_HISTORY=str(world.history_file(20)),
            REMOE_PLANNER_HISTORY_DIR=str(world.folder / "kept"),
        ),
        stderr=subprocess.DEVNULL,
    )
    try:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(
            transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=START_LIMIT_S
        ) as client:

            def report(*tokens: int) -> httpx.Response:
                body = msgspec.json.encode(world.observation(list(tokens)))
                return client.post("/v1/observations", content=body)

            assert report(1, 2).status_code == 202
            assert client.get("/v1/history").json()["durable"]
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, hard))
            refused = report(3, 4)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "history_unwritable"
            stats = client.get("/v1/history").json()
            assert (stats["entries"], stats["durable"]) == (21, False)
            assert stats["problem"]
            assert client.get("/readyz").json()["history_problem"] == stats["problem"]
            asked = client.post("/v1/plan", content=msgspec.json.encode(ask([3, 4])))
            assert len(msgspec.json.decode(asked.content, type=Plan).neighbours) == 15
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
            assert report(3, 4).status_code == 202
            stats = client.get("/v1/history").json()
            assert (stats["entries"], stats["durable"], stats["problem"]) == (22, True, None)
    finally:
        process.kill()
        process.wait(START_LIMIT_S)
    kept = world.planner(history_dir=world.folder / "kept").stats()
    assert (kept.entries, kept.shipped) == (22, 20)
