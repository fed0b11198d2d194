"""The page at `/`, used as people do: in a browser, with the keyboard, in the dark, on a phone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from remoe.accounts.database import open_database
from remoe.accounts.keys import create_key
from remoe.generation import GenerateEvent, GenerateRequest
from tests.gateway.browser import Browser, find_chromium
from tests.gateway.conftest import Stack, eventually
from tests.gateway.tiny_text import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
chromium = find_chromium()
needs_browser = pytest.mark.skipif(
    chromium is None, reason="no Chromium here; install Debian's chromium-headless-shell"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    assert chromium is not None
    with Browser(chromium, tmp_path / "profile") as browser:
        yield browser
        assert browser.problems == []


def shoot(browser: Browser, name: str) -> None:
    """Keep a picture where REMOE_TEST_SCREENSHOTS says, for people to look at."""
    folder = os.environ.get("REMOE_TEST_SCREENSHOTS")
    if folder:
        browser.screenshot(Path(folder) / f"{name}.png")


def ask(browser: Browser, text: str) -> None:
    answers = browser.run("document.querySelectorAll('.message.assistant').length")
    browser.run("document.querySelector('#prompt').focus()")
    browser.write(text)
    browser.press("Enter", 13)
    browser.wait(
        f"[...document.querySelectorAll('.message.assistant .meta')].slice({answers})"
        ".some(meta => meta.textContent.includes('expert calls'))"
    )


def test_programs_get_json_and_browsers_a_page(stack: Stack, http: httpx.Client) -> None:
    assert http.get("/").json()["model"] == MODEL
    page = http.get("/", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in (
        "app.js",
        "balance.js",
        "chat.js",
        "shape.js",
        "plan.js",
        "api.js",
        "style.css",
        "icon.svg",
    ):
        assert http.get(f"/static/{name}").status_code == 200
    assert http.get("/static/../config.py").status_code == 404
    missing = http.get("/static/nothing.js")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")


def test_what_the_page_asks_for(stack: Stack, serve_gateway: Callable[..., str]) -> None:
    url = serve_gateway()
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT).json()
    eventually(lambda: len(httpx.get(f"{url}/dashboard/requests").json()) == 1)
    state = httpx.get(f"{url}/dashboard/state").json()
    assert (state["model"], state["functions"], state["open_requests"]) == (MODEL, None, 0)
    assert (state["balance"]["layer_cv"], state["balance"]["attached"]) == ([0.5], 3)
    (recent,) = httpx.get(f"{url}/dashboard/requests").json()
    assert recent["id"] == reply["id"]
    assert recent["receipt"]["cost_usd"] == reply["x_remoe"]["cost_usd"]
    why = httpx.get(f"{url}/dashboard/requests/{reply['id']}").json()
    assert why["predicted"] == [[0.75, 0.25]]
    assert why["remote"] == [[1]]
    assert sum(why["actual"][0]) == pytest.approx(1)
    assert why["neighbours"][0]["topic"] == "maths"
    assert httpx.get(f"{url}/dashboard/requests/unknown").status_code == 404


def test_a_key_sees_its_own_requests(
    stack: Stack, serve_gateway: Callable[..., str], tmp_path: Path
) -> None:
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    engine = open_database(ledger)
    ours, theirs = ({"authorization": f"Bearer {create_key(engine, n)[1]}"} for n in ("a", "b"))
    engine.dispose()
    url = serve_gateway(ledger=ledger, auth="required")
    reply = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=ours).json()
    eventually(lambda: len(httpx.get(f"{url}/dashboard/requests", headers=ours).json()) == 1)
    assert httpx.get(f"{url}/dashboard/requests", headers=theirs).json() == []
    path = f"{url}/dashboard/requests/{reply['id']}"
    assert httpx.get(path, headers=theirs).status_code == 404
    assert httpx.get(path, headers=ours).status_code == 200
    assert httpx.get(f"{url}/dashboard/state").status_code == 401


@needs_browser
def test_a_conversation_in_a_browser(
    stack: Stack, serve_gateway: Callable[..., str], browser: Browser
) -> None:
    stack.main.say("Paris is the capital")
    browser.dark(on=False)
    browser.open(serve_gateway())
    browser.wait("document.body?.dataset.ready")
    ask(browser, "What is the capital of France?")
    assert "Paris is the capital" in browser.run("document.querySelector('#messages').innerText")
    cost = browser.run("document.querySelector('.message.assistant .meta').textContent")
    assert cost.startswith("$0.")
    # The newest request's plan is explained without being asked for.
    browser.wait("!document.querySelector('#maps').hidden")
    assert "75 % predicted" in browser.run("document.querySelector('#why-text').textContent")
    assert "maths" in browser.run("document.querySelector('#neighbours').innerText")
    browser.run("document.querySelector('#predicted').focus()")
    browser.press("ArrowRight", 39)
    cell = browser.run("document.querySelector('#cell').textContent")
    assert cell.startswith("Layer 0, expert 1 (remote): predicted 25.0 %, actual")
    assert browser.run("document.querySelectorAll('#cost-chart rect').length") == 2
    browser.wait("document.querySelectorAll('#balance-chart rect').length === 2")
    balance = browser.run("document.querySelector('#balance').textContent")
    assert "joint · 3 experts moved in · 2 function replicas wanted · 75 % of routes" in balance
    layer = browser.run("document.querySelector('#balance-chart title').textContent")
    assert layer == "Layer 0: CV 0.50, scaled 0.13, 75 % foretold"
    # A second turn carries the first one.
    ask(browser, "And of Spain?")
    shoot(browser, "desktop-light")
    assert len(stack.main.requests[-1].prompt_tokens) > len(stack.main.requests[0].prompt_tokens)


@needs_browser
def test_on_a_phone_in_the_dark(
    stack: Stack, serve_gateway: Callable[..., str], browser: Browser
) -> None:
    browser.dark(on=True)
    browser.open(serve_gateway(), width=390, height=844, phone=True)
    browser.wait("document.body?.dataset.ready")
    ask(browser, "Hello")
    shoot(browser, "phone-dark")
    # Nothing is wider than the screen, and the dark is dark.
    assert browser.run("document.documentElement.scrollWidth") == 390
    red, *_ = browser.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert red < 60
    browser.run("document.querySelector('#theme').click()")
    red, *_ = browser.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert red > 200
    small = browser.run(
        "[...document.querySelectorAll('header button, form button')]"
        ".filter(b => b.getBoundingClientRect().height < 44).length"
    )
    assert small == 0


@needs_browser
def test_errors_are_told_and_a_stopped_answer_is_cancelled(
    stack: Stack, serve_gateway: Callable[..., str], browser: Browser
) -> None:
    async def script(request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        yield GenerateEvent(tokens=stack.encode("Paris"))
        import asyncio

        await asyncio.sleep(30)

    stack.main.script = script
    browser.open(serve_gateway())
    browser.wait("document.body?.dataset.ready")
    browser.run("document.querySelector('#prompt').focus()")
    browser.write("Hello")
    browser.press("Enter", 13)
    browser.wait("document.querySelector('#messages').innerText.includes('Paris')")
    browser.run("document.querySelector('#send').click()")
    browser.wait("document.querySelector('#messages').innerText.includes('stopped')")
    stack.main.cancelled.wait()
