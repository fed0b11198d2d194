"""The wish for replicas, as it crosses the control socket."""

from __future__ import annotations

import pytest

from remoe.runtime_status import parse_scale_line, scale_line


def test_a_wish_is_read_as_it_was_written() -> None:
    line = scale_line("m-experts-l00-l04", 2, for_s=30)
    assert parse_scale_line(line) == ("m-experts-l00-l04", 2, 30.0)


@pytest.mark.parametrize(
    "line", [b"status\n", b"scale f\n", b"scale f x 3\n", b"scale f -1 3\n", b"scale f 1 nan\n"]
)
def test_what_is_no_wish_is_none(line: bytes) -> None:
    assert parse_scale_line(line) is None
