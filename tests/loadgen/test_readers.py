from __future__ import annotations

import gzip
import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadgen.default_trace import DEFAULT_TRACE, generate
from loadgen.readers import detect_format, read_trace
from loadgen.readers.azure_llm import read_azure_trace
from loadgen.readers.own import read_own_trace, write_own_trace
from loadgen.readers.servegen import read_servegen_rates
from loadgen.trace import ReadOptions, Selection, TracedRequest, TraceError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
COUNTS = "HashOwner,HashApp,HashFunction,Trigger,1,2,3"
SERVEGEN = "window_start_s,client,rate_rps,iat_cv,iat_family,param1,param2"
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
lengths = st.integers(0, 20_000)


def write(tmp_path: Path, *rows: str, end: str = "\r\n", last: bool = False) -> Path:
    path = tmp_path / "trace"
    path.write_bytes((end.join(rows) + (end if last else "")).encode())
    return path


def test_reads_crlf_seven_digits_and_no_last_newline(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        AZURE,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:16:46,879,55",
    )
    assert list(read_azure_trace(path)) == [
        TracedRequest(0.0, 374, 44),
        TracedRequest(4.314579, 396, 109),
        TracedRequest(59.31941, 879, 55),
    ]


@quick
@given(
    rows=st.lists(st.tuples(st.integers(0, 3_600_000_000), lengths, lengths), max_size=20),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    packed=st.booleans(),
)
def test_every_azure_file_comes_back_whole(
    tmp_path: Path, rows: list[tuple[int, int, int]], end: str, last: bool, packed: bool
) -> None:
    rows = sorted(rows)
    zero = datetime(2023, 11, 16, 18, 0, 0)  # noqa: DTZ001
    lines = [
        f"{zero + timedelta(microseconds=at):%Y-%m-%d %H:%M:%S.%f}0,{prompt},{output}"
        for at, prompt, output in rows
    ]
    path = write(tmp_path, AZURE, *lines, end=end, last=last)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    read = list(read_trace(path))
    assert detect_format(path) == "azure-llm"
    assert [(r.prompt_tokens, r.output_tokens) for r in read] == [row[1:] for row in rows]
    for request, (at, _, _) in zip(read, rows, strict=True):
        assert request.arrival_s == pytest.approx((at - rows[0][0]) / 1e6, abs=1e-9)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@quick
@given(rows=st.lists(st.tuples(st.integers(0, 10**7), lengths, lengths), min_size=1, max_size=20))
def test_mooncake_in_both_forms(
    tmp_path: Path, kind: str, rows: list[tuple[int, int, int]]
) -> None:
    rows = sorted(rows)
    if kind == "jsonl":
        lines = [
            json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": [1, 2]})
            for t, i, o in rows
        ]
    else:
        lines = ["timestamp_ms,input_length,output_length", *(f"{t},{i},{o}" for t, i, o in rows)]
    path = write(tmp_path, *lines, end="\n")
    assert list(read_trace(path)) == [
        TracedRequest((t - rows[0][0]) / 1e3, i, o) for t, i, o in rows
    ]


@quick
@given(
    requests=st.lists(
        st.builds(
            TracedRequest,
            st.floats(0, 1e5),
            st.none() | lengths,
            st.none() | lengths,
            st.none() | st.text(max_size=20),
            st.none() | st.text(max_size=5),
        ),
        max_size=20,
    )
)
def test_our_own_traces_come_back_as_written(tmp_path: Path, requests: list[TracedRequest]) -> None:
    requests.sort(key=lambda request: request.arrival_s)
    path = tmp_path / "own.jsonl"
    write_own_trace(path, requests)
    read = list(read_own_trace(path))
    assert [(r.prompt_tokens, r.output_tokens, r.prompt, r.topic) for r in read] == [
        (r.prompt_tokens, r.output_tokens, r.prompt, r.topic) for r in requests
    ]
    assert [r.arrival_s for r in read] == pytest.approx([r.arrival_s for r in requests], abs=1e-6)


@quick
@given(
    counts=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=5),
    seed=st.integers(0, 2**32),
)
def test_function_counts_keep_each_minute(
    tmp_path: Path, counts: list[list[int]], seed: int
) -> None:
    rows = [f"o,a,f{i},http,{','.join(map(str, row))}" for i, row in enumerate(counts)]
    path = write(tmp_path, COUNTS, *rows)
    read = list(read_trace(path, ReadOptions(seed=seed)))
    totals = np.sum(counts, axis=0) if counts else np.zeros(3, int)
    minutes = [int(request.arrival_s // 60) for request in read]
    assert [minutes.count(minute) for minute in range(3)] == list(totals)
    assert read == list(read_trace(path, ReadOptions(seed=seed)))
    # Beginning later gives the same requests from there on.
    later = list(read_trace(path, ReadOptions(seed=seed, start_s=60.0)))
    assert later == [request for request in read if request.arrival_s >= 60.0]


def test_function_invocations_are_sorted_by_their_start(tmp_path: Path) -> None:
    path = write(
        tmp_path, "app,func,end_timestamp,duration", "a,f,10.0,9.0", "a,g,5.0,1.5", "a,f,3.0,0.5"
    )
    assert [request.arrival_s for request in read_trace(path)] == [0.0, 1.5, 2.5]


def servegen(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        SERVEGEN,
        "0,1,5.0,1.0,Gamma,1.0,0.2",
        "0,2,0,,,,",
        "600,1,2.0,3.0,Gamma,0.1,5.0",
        "600,2,10.0,2.0,Weibull,0.5,0.05",
        "1200,1,0,,,,",
        "1200,2,1.0,1.0,Gamma,1.0,1.0",
    )


def test_servegen_rates_become_arrivals_of_that_rate(tmp_path: Path) -> None:
    path = servegen(tmp_path)
    times = np.array([request.arrival_s for request in read_servegen_rates(path)])
    counts = np.histogram(times, [0, 600, 1200, 1800])[0]
    # 3000, 7200 and 600 expected; bursty clients scatter by cv * sqrt(n).
    assert abs(counts[0] - 3000) < 5 * 3000**0.5
    assert abs(counts[1] - 7200) < 5 * (1200**0.5 * 3.2 + 6000**0.5 * 2.3)
    assert abs(counts[2] - 600) < 5 * 600**0.5


def test_servegen_can_begin_anywhere(tmp_path: Path) -> None:
    path = servegen(tmp_path)
    whole = list(read_servegen_rates(path, ReadOptions(seed=3)))
    later = list(read_servegen_rates(path, ReadOptions(seed=3, start_s=700.0)))
    assert later == [request for request in whole if request.arrival_s >= 600.0]
    assert whole != list(read_servegen_rates(path, ReadOptions(seed=4)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("TIME,A,B",), r"trace:1: no known trace begins with 'time,a,b'"),
        ((), r"trace:1: the file is empty"),
        (("", AZURE), r"trace:1: the file is empty or begins with an empty line"),
        ((AZURE, "2023-11-16 18:15:46.1,10,20", "yesterday,1,2"), r"trace:3: .*yesterday"),
        ((AZURE, "2023-11-16 18:15:46.1,ten,20"), r"trace:2: .*ten"),
        ((AZURE, "2023-11-16 18:15:46.1,10,-1"), r"trace:2: .*-1 tokens"),
        ((AZURE, "2023-11-16 18:15:46.1,10"), r"trace:2: 2 cells where the header has 3"),
        (
            (AZURE, "2023-11-16 18:15:46.1,1,1", "2023-11-16 18:15:45.1,1,1"),
            r"sort the trace by time",
        ),
        ((COUNTS, "o,a,f,http,1,2,x"), r"trace:2: .*whole numbers"),
        ((COUNTS, "o,a,f,http,1,2,-3"), r"trace:2: a negative count"),
        (("app,func,end_timestamp,duration", "a,f,1,soon"), r"trace:2: .*seconds"),
        (("timestamp_ms,input_length,output_length", "0,1,2", "0,1,many"), r"trace:3: .*many"),
        (
            ('{"timestamp": 0, "input_length": 1, "output_length": 1}', '{"timestamp": 0}'),
            r"trace:2: Object missing required field `input_length`",
        ),
        (('{"timestamp": 0, "input_length": -1, "output_length": 1}',), r"trace:1: .*negative"),
        ((SERVEGEN, "0,1,2.0,1.0,Pareto,1,1"), r"trace:2: iat_family is 'Pareto'"),
        ((SERVEGEN, "0,1,2.0,1.0,Gamma,-1,1"), r"trace:2: .*positive numbers"),
        ((SERVEGEN, "0,1,2.0,1.0,Gamma,,"), r"trace:2: "),
        (('{"arrival_s": -1}',), r"trace:1: arrival_s must be 0 or more"),
        (('{"arrival_s": 1, "tokens": 3}',), r"trace:1: .*unknown field `tokens`"),
        (('{"arrival_s": 1}', "", "nonsense"), r"trace:3: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        list(read_trace(write(tmp_path, *rows)))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(TraceError, match="not a readable text file"):
        list(read_trace(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a readable text file"):
        list(read_trace(path))


def test_the_shipped_trace_is_what_its_generator_makes(tmp_path: Path) -> None:
    again = tmp_path / "trace.jsonl"
    write_own_trace(again, generate())
    assert again.read_bytes() == DEFAULT_TRACE.read_bytes()
    requests = list(read_trace(DEFAULT_TRACE))
    assert requests[0].arrival_s == 0.0
    assert max(np.diff([request.arrival_s for request in requests])) > 30


TRACE = [TracedRequest(at / 10, at, 1) for at in range(1000)]


@given(small=st.floats(0, 1), large=st.floats(0, 1), seed=st.integers(0, 2**63))
def test_a_smaller_sample_is_part_of_a_larger_one(small: float, large: float, seed: int) -> None:
    small, large = sorted((small, large))
    few = list(Selection(sample=small, seed=seed).apply(TRACE))
    many = list(Selection(sample=large, seed=seed).apply(TRACE))
    assert set(few) <= set(many)
    assert abs(len(few) - 1000 * small) < 6 * (1000 * small * (1 - small)) ** 0.5 + 1
    assert few == list(Selection(sample=small, seed=seed).apply(TRACE))


@given(
    start=st.floats(0, 100),
    length=st.floats(0.1, 50),
    speedup=st.floats(0.1, 100),
    most=st.integers(1, 50),
)
def test_windows_begin_at_zero_and_speed_up(
    start: float, length: float, speedup: float, most: int
) -> None:
    selection = Selection(start_s=start, end_s=start + length, speedup=speedup, max_requests=most)
    kept = list(selection.apply(TRACE))
    inside = [r for r in TRACE if start <= r.arrival_s < start + length][:most]
    assert [r.prompt_tokens for r in kept] == [r.prompt_tokens for r in inside]
    assert [r.arrival_s for r in kept] == [(r.arrival_s - start) / speedup for r in inside]


def test_a_window_does_not_change_who_is_sampled() -> None:
    whole = list(Selection(sample=0.3, seed=5).apply(TRACE))
    part = list(Selection(sample=0.3, seed=5, start_s=50).apply(TRACE))
    assert [r.prompt_tokens for r in part] == [
        r.prompt_tokens for r in whole if (r.prompt_tokens or 0) >= 500
    ]
