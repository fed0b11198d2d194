"""`remoe plan` and `remoe profile hardware`: what people read, and the page they keep."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from planner.app import create_app
from planner.planning import Planner
from remoe.cli import app
from remoe.cli.hardware.allocations import allocations_of, measure_expert_speed
from remoe.cli.hardware.plot import draw
from remoe.cli.hardware.table import profile_table
from remoe.cli.plan import _explained, parse_pairs
from remoe.cli.plan_page import page
from remoe.cli.plan_table import plan_table
from remoe.errors import InvalidRequestError, UnavailableError
from remoe.plan import Slo
from remoe.planning_messages import PreviewRequest
from tests.planner.worlds import EXPERTS, LAYERS, MODEL, World
from tests.remoe.hardware_profiles import some_profile


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    world = World.make(tmp_path)
    profile = some_profile(model_digest=world.model.digest)
    return world.planner(history=world.history_file(20), hardware=profile.save(tmp_path))


@pytest.fixture
def url(planner: Planner) -> Iterator[str]:
    """The planner's own app behind a real socket."""
    import anyio

    async def ask(method: str, path: str, body: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(create_app(planner))
        async with httpx.AsyncClient(transport=transport, base_url="http://planner") as client:
            return await client.request(method, path, content=body)

    class Bridge(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            response = anyio.run(ask, self.command, self.path, body)
            self.send_response(response.status_code)
            self.send_header("content-length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = _serve  # noqa: N815  # what the library calls

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bridge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def asked(**changes: object) -> PreviewRequest:
    request = PreviewRequest(model=MODEL, prompt_tokens=[1, 2, 3], max_new_tokens=9, ratio=0.5)
    return msgspec.structs.replace(request, **changes)


def test_the_table_says_what_a_plan_is_and_why(url: str) -> None:
    told = _explained(url, asked(slo=Slo(ttft_s=60.0, tpot_s=1.0)))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_table(told, console.width))
    text = console.export_text()
    assert f"{LAYERS * EXPERTS // 2} of {LAYERS * EXPERTS} experts remote" in text
    for words in (
        "feasible",
        "MIX",
        "Fetch *",
        "assumes a GPU",
        "experts-00-01",
        "similar prompts",
    ):
        assert words in text
    rows = re.findall(r"^ +(\d+)  ((?: [Lr·] ){4})", text, re.MULTILINE)
    assert [int(layer) for layer, _ in rows] == list(range(LAYERS))


def test_policies_are_shown_with_the_planner_s_choice(url: str) -> None:
    told = _explained(url, asked(streams=4))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_table(told, console.width))
    text, html = console.export_text(), page(told, "hello")
    for policy in ("remoe", "moeless", "joint"):
        marked = f"{policy} (chosen)"
        assert (marked in text) == (marked in html) == (policy == told.plan.policy)
        assert re.search(rf"^{policy}.* GB +\d+ experts$", text, re.MULTILINE)
    assert "Policies" not in page(_explained(url, asked()), "hello")


def test_the_page_stands_alone_and_shows_every_expert(url: str) -> None:
    told = _explained(url, asked())
    text = page(told, "<script>alert(1)</script>")
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=", text)
    assert len(re.findall(r"<i class=r ", text)) == told.plan.partition.remote_count
    assert len(re.findall(r"<i class=[rl] ", text)) == LAYERS * EXPERTS


def test_what_the_planner_refuses_and_a_planner_that_is_gone(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist here"):
        _explained(url, asked(model="another"))
    with pytest.raises(UnavailableError, match="remoe status"):
        _explained("http://127.0.0.1:9", asked())


def test_without_a_platform_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOE_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["plan", "hello"])
    assert result.exit_code == 1
    assert "Start it with `remoe up`" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "ttft=-1", "speed=1", "ttft=1,ttft=2", ""])
def test_a_bad_slo_shows_how_it_is_written(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="ttft=1,tpot=1"):
        parse_pairs(text, "slo", ("ttft", "tpot"))


def test_an_slo_is_read() -> None:
    assert parse_pairs("ttft=1, tpot=0.08", "slo", ("ttft", "tpot")) == {"ttft": 1, "tpot": 0.08}


def test_a_profile_as_a_table_and_a_picture(tmp_path: Path) -> None:
    profile = some_profile()
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        Console(width=140, file=file).print(profile_table(profile))
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert "0.25 vCPU" in text
    assert "warm call" in text
    draw(profile, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cores", [1, 2, 8, 64])
def test_there_are_always_six_allocations(cores: int) -> None:
    shares = allocations_of(cores)
    assert len(shares) >= 6
    assert shares == sorted(set(shares))
    assert shares[0] > 0
    assert shares[-1] <= cores


def test_a_tenth_of_a_core_is_slower_than_a_whole_one(tmp_path: Path) -> None:
    world = World.make(tmp_path)
    model_dir = tmp_path / "model"
    assert world.model.layers
    whole = measure_expert_speed(model_dir, 1.0, [1, 4], seconds=0.3)
    tenth = measure_expert_speed(model_dir, 0.1, [1, 4], seconds=0.3)
    assert len(whole) == len(tenth) == 2
    assert np.min(np.array(tenth) / np.array(whole)) > 2
