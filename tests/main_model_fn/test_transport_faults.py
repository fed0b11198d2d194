"""Whatever an expert function does wrong, nobody waits beyond the deadline or gets another answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from expert_fn.compute import ExpertComputer
from main_model_fn.http_transport import HttpTransport
from main_model_fn.loading import load_split_model
from remoe.checkpoint import Checkpoint
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import ExpertCall
from remoe.experts import Partition
from remoe.topology import Topology
from tests.calls import expert_call
from tests.processes import ExpertProcess
from tests.rogue import Fault, Rogue
from tests.tiny_model import EXPERTS, HIDDEN, LAYERS, VOCABULARY, new_meter, reference

FAULTS: list[Fault] = [
    "garbage", "not_msgpack", "short", "endless", "dribbles", "closes", "resets", "silent"
]  # fmt: skip
# Longer than a busy machine holds a process up.
_PATIENT_S = 0.4


@pytest.fixture(scope="module")
def function(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExpertProcess]:
    work_dir = tmp_path_factory.mktemp("expert")
    with ExpertProcess(tiny_model_dir, work_dir, last_layer=LAYERS - 1) as process:
        yield process


@pytest.fixture
def call(tiny_model_dir: Path) -> ExpertCall:
    hidden = np.linspace(-1, 1, 3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)
    digest = Checkpoint.open(tiny_model_dir).digest
    return expert_call(digest, hidden, {0: [(0, 0.5), (2, 0.25)], 2: [(1, 1.0)]})


@pytest.fixture
def expected(tiny_model_dir: Path, call: ExpertCall) -> bytes:
    checkpoint = Checkpoint.open(tiny_model_dir)
    return ExpertComputer(checkpoint, first_layer=0, last_layer=0).compute(call)


def at_port(topology: Topology, port: int) -> Topology:
    experts = [
        msgspec.structs.replace(endpoint, url=f"http://127.0.0.1:{port}")
        for endpoint in topology.experts
    ]
    return msgspec.structs.replace(topology, experts=experts)


def warm_up(transport: HttpTransport, call: ExpertCall, calls: int = 20) -> None:
    """Enough calls for the transport to know how long they take."""
    for _ in range(calls):
        transport.send(call).result()


@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_reply_is_asked_for_again(
    function: ExpertProcess, call: ExpertCall, expected: bytes, fault: Fault
) -> None:
    with Rogue(function.port) as rogue:
        topology = at_port(function.topology, rogue.port)
        transport = HttpTransport(topology, timeout_s=20, hedge_floor_s=_PATIENT_S)
        warm_up(transport, call)
        rogue.fault, rogue.faults_left = fault, 1
        result = transport.send(call).result()
        assert result.partial == expected
        # Who is late is hedged; everything else breaks the connection.
        late = fault in {"silent", "dribbles"}
        assert (result.hedges, result.retries) == ((1, 0) if late else (0, 1))
        assert rogue.faults == 1
        for _ in range(3):  # and nothing of it is left in the connections
            after = transport.send(call).result()
            assert (after.partial, after.hedges, after.retries) == (expected, 0, 0)
        transport.close()


@pytest.mark.parametrize("fault", [*FAULTS, "unavailable"])
def test_wrong_replies_without_end_are_given_up_in_time(
    function: ExpertProcess, call: ExpertCall, fault: Fault
) -> None:
    with Rogue(function.port) as rogue:
        transport = HttpTransport(at_port(function.topology, rogue.port), timeout_s=1.0)
        warm_up(transport, call)
        rogue.fault = fault
        began = time.monotonic()
        with pytest.raises(ExpertUnavailableError, match="tiny-experts"):
            transport.send(call).result()
        assert time.monotonic() - began < 3
        assert 1 <= rogue.faults <= 2  # at most one retry, whatever its reason
        with pytest.raises(ExpertUnavailableError, match="a moment ago"):
            transport.send(call).result()
        transport.close()


@pytest.mark.parametrize("fault", ["garbage", "short", "resets", "unavailable"])
def test_logits_are_the_unmodified_models_whatever_comes_back(
    tiny_model_dir: Path, function: ExpertProcess, fault: Fault
) -> None:
    tokens = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
    meter = new_meter()
    with Rogue(function.port) as rogue:
        rogue.fault = fault
        transport = HttpTransport(at_port(function.topology, rogue.port), timeout_s=5)
        model = load_split_model(
            tiny_model_dir,
            partition=Partition(experts=EXPERTS, remote=((0, 1, 2),) * LAYERS),
            dtype=torch.float32,
            device=torch.device("cpu"),
            transport=transport,
            function_memory_gb=dict.fromkeys(range(LAYERS), 0.5),
            meter=meter,
        )
        with torch.no_grad():
            wanted, got = reference(tiny_model_dir)(tokens).logits, model(tokens).logits
        assert rogue.faults
        transport.close()
    assert torch.allclose(wanted, got, atol=1e-5)


def test_a_frozen_replica_is_hedged_on_another(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall, expected: bytes
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20, hedge_floor_s=_PATIENT_S)
        warm_up(transport, call)
        frozen = function.process
        function.start()
        frozen.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        hedged = transport.send(call).result()
        # Well before the time-out; the other replica may have been starting.
        assert time.monotonic() - began < 10
        assert (hedged.partial, hedged.hedges, hedged.retries) == (expected, 1, 0)
        assert function.replica(hedged.replica) is not frozen
        after = transport.send(call).result()  # on the connection that answered
        assert (after.partial, after.hedges, after.replica) == (expected, 0, hedged.replica)
        frozen.send_signal(signal.SIGCONT)  # what it says now, it says to nobody
        warm_up(transport, call, 5)
        assert transport.send(call).result().partial == expected
        transport.close()


def test_a_replica_killed_during_a_call_is_replaced_by_the_other(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall, expected: bytes
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1, replicas=2) as function:
        # No hedge, so that it is the broken connection that is noticed.
        transport = HttpTransport(function.topology, timeout_s=20, hedge_floor_s=15)
        victim = function.replica(transport.send(call).result().replica)
        victim.send_signal(signal.SIGSTOP)
        pending = transport.send(call)
        victim.send_signal(signal.SIGKILL)
        victim.wait(timeout=5)
        result = pending.result()
        assert (result.partial, result.retries, result.hedges) == (expected, 1, 0)
        assert function.replica(result.replica) is not victim
        transport.close()


def test_a_cold_start_is_not_hedged(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall, expected: bytes
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20, hedge_floor_s=1e-4)
        cold = transport.send(call).result()
        assert (cold.partial, cold.hedges) == (expected, 0)
        for _ in range(40):
            transport.send(call).result()
        assert function.terminate() == 0
        function.start()
        again = transport.send(call).result()
        assert (again.partial, again.hedges, again.retries) == (expected, 0, 0)
        assert again.cold_start_s > 0
        transport.close()


def test_who_was_idle_for_long_is_not_hedged(function: ExpertProcess, call: ExpertCall) -> None:
    now = 100.0
    with Rogue(function.port) as rogue:
        transport = HttpTransport(
            at_port(function.topology, rogue.port), timeout_s=0.5, clock=lambda: now
        )
        warm_up(transport, call)
        now += 6  # as long as Knative may take to scale to zero
        rogue.fault = "silent"
        with pytest.raises(ExpertUnavailableError, match=r"no reply within 0\.5 s"):
            transport.send(call).result()
        assert rogue.faults == 1
        transport.close()


def test_a_call_waits_no_longer_than_its_request(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall, expected: bytes
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20)
        transport.send(call).result()
        function.stop_reading()
        for deadline_s in (0.2, 0.0, -1.0):
            began = time.monotonic()
            with pytest.raises(ExpertUnavailableError, match="no reply within"):
                transport.send(call, deadline_s=deadline_s).result()
            assert time.monotonic() - began < 2
        function.process.send_signal(signal.SIGCONT)
        # So short a wait says nothing about the function: it is asked again at once.
        assert transport.send(call, deadline_s=15).result().partial == expected
        transport.close()


def test_a_call_larger_than_the_socket_holds_arrives_whole(
    tiny_model_dir: Path, function: ExpertProcess
) -> None:
    rows = 40_000  # 5 MB each way
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
    checkpoint = Checkpoint.open(tiny_model_dir)
    large = expert_call(checkpoint.digest, hidden, {1: [(row, 0.5) for row in range(rows)]})
    transport = HttpTransport(function.topology, timeout_s=60)
    result = transport.send(large).result()
    computer = ExpertComputer(checkpoint, first_layer=0, last_layer=0)
    assert result.partial == computer.compute(large)
    assert result.bytes_moved > 2 * large.rows * HIDDEN * 4
    transport.close()


@pytest.mark.parametrize(
    ("change", "code", "to_blame"),
    [
        ({"model_digest": "sha256:other"}, "wrong_model", True),
        ({"experts": [0, EXPERTS]}, "unknown_expert", True),
        ({"rows": 4}, "wrong_shape", False),
        ({"offsets": [0, 1]}, "wrong_shape", False),
        ({"hidden": bytes(70_000), "rows": 70_000 // (4 * HIDDEN)}, "body_too_large", False),
        # Its body is within the limit, but not the answer in float32.
        ({"hidden": bytes(600 * 2 * HIDDEN), "rows": 600, "dtype": "bfloat16"}, "body_too_large", False),
    ],
)  # fmt: skip
def test_refusals_are_typed_and_only_some_are_the_functions_fault(
    small_function: ExpertProcess,
    call: ExpertCall,
    change: dict[str, object],
    code: str,
    to_blame: bool,
) -> None:
    transport = HttpTransport(small_function.topology, timeout_s=20)
    with pytest.raises(ExpertUnavailableError, match=code):
        transport.send(msgspec.structs.replace(call, **change)).result()
    if to_blame:
        with pytest.raises(ExpertUnavailableError, match="a moment ago"):
            transport.send(call).result()
    else:
        assert transport.send(call).result().retries == 0
    transport.close()


@pytest.fixture(scope="module")
def small_function(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExpertProcess]:
    """One that takes and gives 65,536 bytes at most."""
    with ExpertProcess(
        tiny_model_dir,
        tmp_path_factory.mktemp("small"),
        last_layer=LAYERS - 1,
        settings={"REMOE_EXPERT_PAYLOAD_LIMIT_BYTES": "65536"},
    ) as process:
        yield process


def test_a_traced_call_says_so_to_what_stands_between(
    function: ExpertProcess, call: ExpertCall
) -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    with Rogue(function.port) as proxy:
        transport = HttpTransport(at_port(function.topology, proxy.port), timeout_s=20)
        for given in (None, traceparent):
            transport.send(call, traceparent=given).result()
        transport.close()
        plain, traced = proxy.requests
    assert b"traceparent" not in plain
    assert f"\r\ntraceparent: {traceparent}\r\n".encode() in traced
