"""Any split of the experts gives the unmodified model's answer."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from remoe.errors import CheckpointError
from tests.tiny_model import (
    EXPERTS,
    LAYERS,
    VOCABULARY,
    InProcessTransport,
    new_meter,
    reference,
    split,
)

remote_sets = st.tuples(
    *[
        st.sets(st.integers(0, EXPERTS - 1)).map(lambda found: tuple(sorted(found)))
        for _ in range(LAYERS)
    ]
)
batches = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31))


@pytest.fixture(scope="module")
def unmodified(tiny_model_dir: Path) -> PreTrainedModel:
    return reference(tiny_model_dir)


def random_tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@given(remote=remote_sets, batch=batches)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_logits_equal_the_unmodified_models_for_any_partition(
    tiny_model_dir: Path,
    unmodified: PreTrainedModel,
    remote: tuple[tuple[int, ...], ...],
    batch: tuple[int, int, int],
) -> None:
    tokens = random_tokens(*batch)
    model = split(tiny_model_dir, remote, InProcessTransport(tiny_model_dir))
    with torch.no_grad():
        expected, got = unmodified(tokens).logits, model(tokens).logits
    assert (expected - got).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("remote", [((),) * 3, ((0, 1), (2, 3), (1, 2)), ((0, 1, 2, 3),) * 3])
def test_greedy_tokens_equal_generates(
    tiny_model_dir: Path, unmodified: PreTrainedModel, remote: tuple[tuple[int, ...], ...]
) -> None:
    tokens = random_tokens(1, 9, 7)
    model = split(tiny_model_dir, remote, InProcessTransport(tiny_model_dir))
    expected = unmodified.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=-1)
    got = model.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=-1)
    assert torch.equal(expected, got)


def test_all_local_in_bfloat16_is_bit_identical(tiny_model_dir: Path) -> None:
    tokens = random_tokens(2, 8, 3)
    unmodified = reference(tiny_model_dir, torch.bfloat16)
    transport = InProcessTransport(tiny_model_dir)
    model = split(tiny_model_dir, ((),) * 3, transport, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(unmodified(tokens).logits, model(tokens).logits)
    assert transport.calls == []


def test_a_lost_function_changes_nothing_but_the_bill(
    tiny_model_dir: Path, unmodified: PreTrainedModel
) -> None:
    tokens = random_tokens(1, 11, 5)
    transport = InProcessTransport(tiny_model_dir)
    transport.refuse = {0, 2}
    model = split(tiny_model_dir, ((0, 1, 2),) * 3, transport)
    with torch.no_grad():
        expected, got = unmodified(tokens).logits, model(tokens).logits
    assert torch.allclose(expected, got, atol=1e-5)
    assert {call.layer for call in transport.calls} >= {0, 2}


def test_one_call_per_layer_with_each_row_once(tiny_model_dir: Path) -> None:
    transport = InProcessTransport(tiny_model_dir)
    model = split(tiny_model_dir, ((0, 1, 2, 3),) * 3, transport)
    with torch.no_grad():
        model(random_tokens(2, 6, 1))
    assert [call.layer for call in transport.calls] == [0, 1, 2]
    assert all(call.rows == 12 for call in transport.calls)
    # Top-2: two routes for each of the twelve rows, whose vectors travel once.
    assert all(call.offsets[-1] == 24 for call in transport.calls)


def test_a_payload_over_the_limit_is_cut_into_calls_and_changes_nothing(
    tiny_model_dir: Path, unmodified: PreTrainedModel
) -> None:
    tokens = random_tokens(1, 12, 9)
    transport = InProcessTransport(tiny_model_dir)
    limit = 512 + 4 * 10 + 5 * (4 * 32 + 2 * 8)  # five rows a call, each of 32 with two routes
    model = split(tiny_model_dir, ((0, 1, 2, 3),) * 3, transport, payload_limit_bytes=limit)
    with torch.no_grad():
        expected, got = unmodified(tokens).logits, model(tokens).logits
    assert torch.allclose(expected, got, atol=1e-5)
    assert all(len(msgspec.msgpack.encode(call)) <= limit for call in transport.calls)
    assert [call.rows for call in transport.calls] == [5, 5, 2] * 3


def test_a_partition_of_another_model_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="the model has 3 of 4"):
        split(tiny_model_dir, ((0,),) * 2, InProcessTransport(tiny_model_dir))


def test_routes_of_a_forward_pass_are_counted(tiny_model_dir: Path) -> None:
    from main_model_fn.metering import Span

    meter = new_meter()
    model = split(tiny_model_dir, ((0, 1),) * 3, InProcessTransport(tiny_model_dir), meter)
    request = meter.open()
    meter.begin_step([Span(request, 10, prefill=10)], now=1.0)
    with torch.no_grad():
        model(random_tokens(1, 10, 2))
    meter.end_step(now=3.0)
    assert request.prefill_counts.sum(axis=1).tolist() == [20, 20, 20]
    assert request.decode_counts.sum() == 0
    assert request.ledger.main_cpu_gb_s == pytest.approx(2.0 * 2.0)
    assert request.ledger.remote_calls == 3
    assert request.ledger.remote_gb_s > 0


def test_calls_carry_how_long_their_requests_still_wait(tiny_model_dir: Path) -> None:
    from main_model_fn.metering import Span

    meter, transport = new_meter(), InProcessTransport(tiny_model_dir)
    model = split(tiny_model_dir, ((0, 1, 2, 3),) * 3, transport, meter)
    request, patient = meter.open(time.monotonic() + 30), meter.open()
    for spans in ([Span(request, 4)], [Span(request, 2), Span(patient, 2)]):
        meter.begin_step(spans, now=1.0)
        with torch.no_grad():
            model(random_tokens(1, 4, 2))
    assert transport.traceparents == [None] * 6
    limited, unlimited = transport.deadlines_s[:3], transport.deadlines_s[3:]
    assert all(deadline is not None and 20 < deadline <= 30 for deadline in limited)
    assert unlimited == [None] * 3


def test_calls_belong_to_the_first_trace_of_their_step(tiny_model_dir: Path) -> None:
    from main_model_fn.metering import Span
    from remoe.tracing import Span as TraceSpan

    meter, transport = new_meter(), InProcessTransport(tiny_model_dir)
    transport.refuse = {2}  # a lost call has a span too
    model = split(tiny_model_dir, ((0, 1, 2, 3),) * 3, transport, meter)
    traced = [f"00-{name * 32}-{name * 16}-01" for name in "ab"]
    requests = [meter.open(), *(meter.open(trace=TraceSpan(name)) for name in traced)]
    for spans in ([Span(request, 2) for request in requests], [Span(requests[0], 6)]):
        meter.begin_step(spans, now=1.0)
        with torch.no_grad():
            model(random_tokens(1, 6, 2))
    assert transport.traceparents == [traced[0]] * 3 + [None] * 3
