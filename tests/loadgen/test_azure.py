from __future__ import annotations

from pathlib import Path

import pytest

from loadgen.azure import TracedRequest, TraceError, read_azure_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes("\r\n".join(rows).encode())
    return path


def test_reads_crlf_seven_digits_and_no_last_newline(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:16:46,879,55",
    )
    assert list(read_azure_trace(path)) == [
        TracedRequest(0.0, 374, 44),
        TracedRequest(4.314579, 396, 109),
        TracedRequest(59.31941, 879, 55),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("TIME,A,B",), r"trace\.csv:1: the header"),
        ((), r"trace\.csv:1: the header"),
        ((HEADER, "2023-11-16 18:15:46.1,10,20", "yesterday,1,2"), r"trace\.csv:3: .*yesterday"),
        ((HEADER, "2023-11-16 18:15:46.1,ten,20"), r"trace\.csv:2: .*ten"),
        ((HEADER, "2023-11-16 18:15:46.1,10"), r"trace\.csv:2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        list(read_azure_trace(write(tmp_path, *rows)))
