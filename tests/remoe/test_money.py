"""Prices and nano-dollars: exact, checked, and each number with its source."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe.errors import SettingsError
from remoe.ledger import Ledger
from remoe.money import Charge, Usage, gb_s, kb_s, price, usd
from remoe.prices import DEFAULT_PRICES, PriceBook, load_prices, price_book_names

_BOOK: dict[str, object] = {
    "name": "mine",
    "title": "Our own machines",
    "as_of": "2026-11",
    "vcpu_per_s": {"usd": "0.00001", "source": "invoice 7"},
    "memory_per_gb_s": {"usd": "0.000002", "source": "invoice 7"},
    "vcpu_per_gb": "0.5",
}


def test_golden_charge() -> None:
    ledger = Ledger(main_gpu_gb_s=1.5, main_cpu_gb_s=3.365, remote_gb_s=0.060)
    charge = Charge.of(Usage.of(ledger), DEFAULT_PRICES)
    assert charge == Charge(
        main_gpu_nano_usd=63_000, main_cpu_nano_usd=77_395, remote_nano_usd=1_380
    )
    assert charge.total_nano_usd == 141_775
    assert usd(charge.total_nano_usd) == 0.000141775


@given(st.integers(0, 2**50))
def test_decimals_stand_for_whole_numbers(amount: int) -> None:
    assert kb_s(gb_s(amount)) == amount
    assert round(json.loads(json.dumps(usd(amount))) * 1e9) == amount


@given(st.integers(0, 10**12), st.floats(1e-9, 1e-2))
def test_a_price_is_off_by_half_a_nano_dollar_at_most(amount: int, per_gb_s: float) -> None:
    exact = Decimal(amount) * Decimal(repr(per_gb_s)) * 1000
    assert abs(price(amount, per_gb_s) - exact) <= Decimal("0.5")


def test_a_gpu_without_a_price_is_not_billed_as_free() -> None:
    book = load_prices("aws-lambda")
    assert book.gpu_usd_per_gb_s is None
    assert Charge.of(Usage(main_gpu_kb_s=1, main_cpu_kb_s=0, remote_kb_s=0), book) is None
    assert Charge.of(Usage(main_gpu_kb_s=0, main_cpu_kb_s=1, remote_kb_s=0), book) is not None


def test_shipped_books() -> None:
    books = {name: load_prices(name) for name in price_book_names()}
    assert set(books) == {"alibaba-fc", "aws-lambda", "azure-container-apps", "gcp-cloud-run"}
    assert books["alibaba-fc"] == DEFAULT_PRICES
    assert (DEFAULT_PRICES.cpu_usd_per_gb_s, DEFAULT_PRICES.gpu_usd_per_gb_s) == (2.3e-5, 4.2e-5)
    assert books["aws-lambda"].cpu_usd_per_gb_s == 1.66667e-5
    # 0.0000025 USD per GiB·s is less per GB·s.
    assert books["gcp-cloud-run"].cpu_usd_per_gb_s == pytest.approx(2.4e-5 + 2.5e-6 / 1.073741824)
    for name, book in books.items():
        assert book.name == name
        assert "https://" in book.source


def test_a_book_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_bytes(msgspec.json.encode(_BOOK))
    assert load_prices(str(path)) == PriceBook(
        name="mine", source="invoice 7", as_of="2026-11", cpu_usd_per_gb_s=7e-6
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vcpu_per_s": {"usd": "0.07", "source": "s"}}, "not per hour"),
        ({"vcpu_per_s": {"usd": "0", "source": "s"}}, "above 0"),
        ({"vcpu_per_s": {"usd": "0.00001", "source": ""}}, "length >= 1"),
        ({"vcpu_per_s": None}, "a book needs"),
        ({"memory_with_cpu_per_gb_s": {"usd": "0.00001", "source": "s"}}, "already has the CPU"),
        ({"as_of": "last year"}, "as_of"),
        ({"vcpu_per_gb": "-1"}, "above 0"),
        ({"gpu_per_hour": 3}, "unknown field `gpu_per_hour`"),
    ],
)
def test_a_bad_book_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = tmp_path / "prices.json"
    path.write_bytes(msgspec.json.encode({**_BOOK, **changes}))
    with pytest.raises(SettingsError, match=says):
        load_prices(str(path))


def test_an_unknown_book_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match="alibaba-fc, aws-lambda"):
        load_prices("oracle")
