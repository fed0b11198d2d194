"""Books of the whole platform: nothing that a client was told is lost when the gateway is killed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer

from remoe.accounts.bill import make_bill
from remoe.accounts.database import open_database
from tests.e2e.platform import Platform
from tests.gateway.tiny_text import write_model
from tests.tiny_model import build_tiny_checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("tiny-moe"))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    build_tiny_checkpoint(folder, vocabulary=vocabulary)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return folder


class _Client(threading.Thread):
    """Streams one completion after the other, and keeps what each complete answer cost."""

    def __init__(self, platform: Platform, stop: threading.Event) -> None:
        super().__init__()
        self.costs: dict[str, int] = {}
        self.broken = 0
        self._platform = platform
        self._stop_asked = stop
        self._model = platform.client.models.list().data[0].id

    def run(self) -> None:
        while not self._stop_asked.is_set():
            last = None
            try:
                for chunk in self._platform.client.completions.create(
                    model=self._model, prompt="Hello world", max_tokens=8, stream=True
                ):
                    last = chunk
            except openai.APIError:
                self.broken += 1
                continue
            except Exception:  # noqa: BLE001  # httpx's own, when a stream is cut
                self.broken += 1
                continue
            receipt = (last.model_extra or {}).get("x_remoe") if last else None
            if last is not None and receipt:
                self.costs[last.id] = round(receipt["cost_usd"] * 1e9)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_gateway_loses_no_acknowledged_request(model_dir: Path, tmp_path: Path) -> None:
    with Platform(model_dir, tmp_path) as platform:
        stop = threading.Event()
        clients = [_Client(platform, stop) for _ in range(4)]
        for client in clients:
            client.start()
        for kills in range(1, 4):
            wanted = 10 * kills
            platform.wait_for(
                lambda wanted=wanted: sum(len(c.costs) for c in clients) >= wanted,  # type: ignore[misc]
                within_s=60,
            )
            (gateway,) = platform.pids_of("gateway")
            os.kill(gateway, signal.SIGKILL)
        platform.wait_for(lambda: sum(len(c.costs) for c in clients) >= 40, within_s=60)
        stop.set()
        for client in clients:
            client.join(30)
    told = {name: cost for client in clients for name, cost in client.costs.items()}
    assert len(told) >= 40
    engine = open_database(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT id, total_nano_usd FROM remoe_requests")
        written = dict(rows.tuples().all())
    total = make_bill(engine, by="day").total
    engine.dispose()
    assert {name: written.get(name) for name in told} == told
    assert total.total_nano_usd == sum(written.values())
    # The resident ledger follows the supervisor across the gateway's lives.
    assert total.resident_kb_s > 0
