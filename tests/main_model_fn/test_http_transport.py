"""Expert calls over HTTP against real processes that are killed, absent, or wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from expert_fn.compute import ExpertComputer
from main_model_fn.http_transport import HttpTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import ExpertUnavailableError
from remoe.expert_call import TOKEN_VARIABLE, ExpertCall
from remoe.topology import ExpertEndpoint, Topology
from tests.calls import expert_call
from tests.processes import ExpertProcess
from tests.tiny_model import HIDDEN, LAYERS


@pytest.fixture
def call(tiny_model_dir: Path) -> ExpertCall:
    hidden = np.linspace(-1, 1, 3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)
    digest = Checkpoint.open(tiny_model_dir).digest
    return expert_call(digest, hidden, {0: [(0, 0.5), (2, 0.25)], 2: [(1, 1.0)]})


def test_survives_a_killed_function(tiny_model_dir: Path, tmp_path: Path, call: ExpertCall) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    expected = ExpertComputer(checkpoint, first_layer=0, last_layer=0).compute(call)
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20)
        cold = transport.send(call).result()
        assert cold.cold_start_s > 0  # the process was starting when the call was sent
        assert cold.partial == expected

        warm = transport.send(call).result()
        assert warm.cold_start_s == 0
        assert warm.retries == 0
        assert warm.bytes_moved > len(call.hidden)

        function.stop_reading()
        pending = transport.send(call)
        function.kill()  # in the middle of the call
        function.start()
        again = pending.result()
        assert again.retries == 1
        assert again.cold_start_s > 0
        assert again.partial == cold.partial
        transport.close()


def test_a_function_that_scaled_away_between_calls_is_no_failure(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20)
        before = transport.send(call).result()
        assert function.terminate() == 0
        function.start()
        after = transport.send(call).result()
        assert after.retries == 0
        assert after.cold_start_s > 0
        assert after.partial == before.partial
        transport.close()


def test_calls_in_flight_together_each_get_their_own_answer(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall
) -> None:
    other = msgspec.structs.replace(call, layer=1)
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20)
        first, second = transport.send(call), transport.send(other)
        second_result, first_result = second.result(), first.result()
        assert first_result.partial == transport.send(call).result().partial
        assert second_result.partial == transport.send(other).result().partial
        assert first_result.partial != second_result.partial
        transport.close()


def test_a_function_that_never_answers_opens_the_breaker(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        function.kill()  # the socket stays: the call is held, and its time runs out
        now = 50.0
        transport = HttpTransport(function.topology, timeout_s=0.2, clock=lambda: now)
        with pytest.raises(ExpertUnavailableError, match="tiny-experts"):
            transport.send(call).result()
        with pytest.raises(ExpertUnavailableError, match="a moment ago"):
            transport.send(call).result()
        now = 60.0
        function.start()
        patient = HttpTransport(function.topology, timeout_s=20, clock=lambda: now)
        assert patient.send(call).result().retries == 0
        transport.close()
        patient.close()


def test_processors_are_shared_with_functions_of_this_machine(tiny_model_dir: Path) -> None:
    for host, beside in (("127.0.0.1:1", True), ("experts.models.svc", False)):
        endpoint = ExpertEndpoint(
            name="e", url=f"http://{host}", first_layer=0, last_layer=0, memory_gb=1
        )
        topology = Topology(
            model="tiny",
            model_dir=str(tiny_model_dir),
            gateway_url="",
            planner_url="",
            main_url="",
            main_memory_gb=1,
            experts=[endpoint],
        )
        transport = HttpTransport(topology, timeout_s=1)
        assert transport.beside == beside
        transport.close()


def test_a_refusal_names_its_reason(tiny_model_dir: Path, tmp_path: Path, call: ExpertCall) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        transport = HttpTransport(function.topology, timeout_s=20)
        wrong = msgspec.structs.replace(call, model_digest="sha256:other")
        with pytest.raises(ExpertUnavailableError, match="wrong_model"):
            transport.send(wrong).result()
        transport.close()


def test_nobody_listening_is_an_error_not_a_wait(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall
) -> None:
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        topology = function.topology
    transport = HttpTransport(topology, timeout_s=20)
    with pytest.raises(ExpertUnavailableError, match="refused"):
        transport.send(call).result()
    transport.close()


def test_a_function_with_a_token_answers_who_has_it(
    tiny_model_dir: Path, tmp_path: Path, call: ExpertCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "shared")
    with ExpertProcess(tiny_model_dir, tmp_path, last_layer=LAYERS - 1) as function:
        for token, answered in (("shared", True), ("other", False), ("", False)):
            transport = HttpTransport(function.topology, timeout_s=20, token=token)
            pending = transport.send(call)
            if answered:
                assert pending.result().partial
            else:
                with pytest.raises(ExpertUnavailableError, match="unauthorized"):
                    pending.result()
            transport.close()
