"""`remoe bill`, `remoe key`, and what `remoe up` refuses before it starts anything."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from remoe.accounts.database import open_database
from remoe.accounts.entries import write_entries
from remoe.cli import app
from remoe.cli.bill import dollars
from remoe.cli.front_door import FrontDoor
from remoe.errors import SettingsError
from remoe.home import default_ledger_url
from tests.remoe.accounts.rows import entry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("REMOE_GATEWAY_LEDGER", raising=False)
    return tmp_path


def remoe(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def fill() -> None:
    engine = open_database(default_ledger_url())
    with engine.begin() as connection:
        write_entries(
            connection,
            [
                entry("a", total_nano_usd=1_000_000_001, day="2026-01-01"),
                entry("b", total_nano_usd=2, day="2026-01-02", model="other"),
                entry("c", total_nano_usd=0, day="2026-01-02", metered=False),
            ],
        )
    engine.dispose()


def test_a_bill_on_the_terminal() -> None:
    fill()
    result = remoe("bill", "--by", "model")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("other") and "$0.000000002" in line for line in lines)
    assert any(line.startswith("total") and "$1.000000003" in line for line in lines)
    assert "1 requests are unmetered" in result.output


def test_a_bill_for_a_spreadsheet_adds_up() -> None:
    fill()
    result = remoe("bill", "--csv")
    table = list(csv.DictReader(io.StringIO(result.output)))
    *lines, total = table
    assert [line["day"] for line in lines] == ["2026-01-01", "2026-01-02"]
    assert total["day"] == "total"
    for column in table[0].keys() - {"day"}:
        assert sum(int(line[column]) for line in lines) == int(total[column])


def test_a_bill_for_programs() -> None:
    fill()
    bill = json.loads(remoe("bill", "--json", "--since", "2026-01-02").output)
    assert bill["total"]["requests"] == 2
    assert bill["total"]["total_nano_usd"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bill"], "there is no ledger at"),
        (["bill", "--since", "yesterday"], "YYYY-MM-DD, not 'yesterday'"),
        (["bill", "--csv", "--json"], "choose one of --csv and --json"),
        (["key", "list"], "there is no ledger at"),
        (["key", "create", "x", "--budget", "-3"], "dollars above 0, such as 2.50"),
        (["up", "--host", "example.org"], "an IP address such as 0.0.0.0"),
        (["up", "--host", "0.0.0.0"], "remoe key create"),  # noqa: S104
        (["up", "--tls-cert", "cert.pem"], "both --tls-cert and --tls-key"),
        (["up", "--tls-cert", "no.pem", "--tls-key", "no.pem"], "cannot be used"),
        (["up", "--prices", "oracle"], "there is no price book 'oracle'"),
    ],
)
def test_a_mistake_is_a_line_and_a_status(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knative.local.listening.check_port", lambda *where: None)
    result = remoe(*arguments)
    assert result.exit_code != 0
    assert says in " ".join(result.output.replace("│", " ").split())


def test_a_key_s_life() -> None:
    made = remoe(
        *("key", "create", "ada", "--budget", "2.50", "--requests-per-minute", "60"),
        *("--model", "tiny"),
    )
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert secret.startswith("sk-remoe-")
    listed = remoe("key", "list").output
    assert "ada" in listed
    assert "$2.500000000" in listed
    assert secret not in listed
    (key,) = json.loads(remoe("key", "list", "--json").output)
    assert (key["models"], key["requests_per_minute"]) == (["tiny"], 60)
    assert remoe("key", "revoke", key["id"]).exit_code == 0
    assert "ada" not in remoe("key", "list").output
    assert "ada" in remoe("key", "list", "--all").output
    assert "no active key" in remoe("key", "revoke", key["id"]).output


def test_a_public_address_with_a_key_or_when_told() -> None:
    def door(auth: str | None) -> FrontDoor:
        return FrontDoor(
            host="0.0.0.0",  # noqa: S104
            auth=auth,
            tls_cert=None,
            tls_key=None,
            cors_origins=("https://a.example",),
            ledger=default_ledger_url(),
        )

    assert door("off").environment()["REMOE_GATEWAY_AUTH"] == "off"
    with pytest.raises(SettingsError, match="no API key yet"):
        door(None).environment()
    remoe("key", "create", "ada")
    environment = door(None).environment()
    assert environment["REMOE_GATEWAY_CORS_ORIGINS"] == "https://a.example"


def test_dollars_are_printed_whole() -> None:
    assert dollars(1) == "$0.000000001"
    assert dollars(1_234_567_890_123) == "$1,234.567890123"
