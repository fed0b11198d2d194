from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from loadgen.chunks import decode_chunk, error_message
from loadgen.sse import EventSplitter

lines = st.one_of(
    st.text(st.sampled_from("abc: {}é"), max_size=12),
    st.sampled_from(["data", "data:", "data: x", "data:  y", ": comment", "event: e", "id: 1", ""]),
)


def split(chunks: list[bytes]) -> list[bytes]:
    splitter = EventSplitter()
    return [event for chunk in chunks for event in splitter.feed(chunk)]


@given(
    parts=st.lists(st.tuples(lines, st.sampled_from(["\n", "\r\n", "\r"])), max_size=20),
    cuts=st.lists(st.integers(0, 300), max_size=10),
)
def test_events_are_the_same_at_any_chunk_borders(
    parts: list[tuple[str, str]], cuts: list[int]
) -> None:
    """The oracle is OpenAI's own client, given everything at once."""
    whole = "".join(line + end for line, end in parts).encode() + b"\n\n"
    borders = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    chunks = [whole[a:b] for a, b in pairwise(borders)]
    expected = [
        event.data.encode()
        for event in SSEDecoder().iter_bytes(iter([whole]))
        if b"data" in whole and event.data
    ]
    assert [event for event in split(chunks) if event] == expected
    assert split(chunks) == split([whole])


def test_a_stream_cut_anywhere_gives_whole_events_only() -> None:
    stream = b'data: {"a": 1}\r\n\r\n: beat\r\n\r\ndata: [DONE]\r\n\r\n'
    for cut in range(len(stream)):
        assert split([stream[:cut]]) in ([], [b'{"a": 1}'], [b'{"a": 1}', b"[DONE]"])
        assert split([stream[:cut], stream[cut:]]) == [b'{"a": 1}', b"[DONE]"]


def test_chunks_of_any_server_are_understood() -> None:
    assert decode_chunk(b'{"choices": [{"delta": {"content": "a"}, "logprobs": null}]}').has_text
    assert decode_chunk(b'{"choices": [{"text": "a"}], "new": {}}').has_text
    assert decode_chunk(b'{"choices": [{"delta": {"reasoning_content": "a"}}]}').has_text
    assert not decode_chunk(
        b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}'
    ).has_text
    last = decode_chunk(b'{"choices": [{"delta": {}, "finish_reason": "length"}], "usage": null}')
    assert last.finish_reason == "length"


def test_errors_in_any_of_the_usual_shapes() -> None:
    assert error_message(b'{"error": {"message": "m", "code": 7}}') == ("7", "m")
    assert error_message(b'{"error": {"message": "m", "type": "t"}}') == ("t", "m")
    assert error_message(b'{"error": "m"}') == (None, "m")
    assert error_message(b'{"detail": [1]}') == (None, "[1]")
    assert error_message(b"<html>bad gateway</html>") == (None, "<html>bad gateway</html>")


def test_an_error_in_a_stream_is_seen() -> None:
    assert decode_chunk(b'{"error": {"message": "m"}}').failed
    assert not decode_chunk(b'{"choices": [], "error": null}').failed
    assert not decode_chunk(b'{"choices": []}').failed
