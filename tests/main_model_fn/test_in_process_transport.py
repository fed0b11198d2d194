"""Remote experts without functions, as REMOE_MAIN_TRANSPORT=in-process serves them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from expert_fn.compute import ExpertComputer
from main_model_fn.app import open_transport
from main_model_fn.config import MainSettings
from main_model_fn.http_transport import HttpTransport
from main_model_fn.in_process_transport import InProcessTransport
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError
from remoe.expert_call import ITEM_BYTES, ExpertCall, RowDtype
from remoe.kernel.native_library import NativePool
from remoe.topology import Topology
from tests.calls import expert_call, sums
from tests.tiny_model import HIDDEN

NOWHERE = Topology(
    model="tiny",
    model_dir="",
    gateway_url="",
    planner_url="",
    main_url="",
    main_memory_gb=1.0,
    experts=[],
)


def settings_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> MainSettings:
    monkeypatch.setenv("REMOE_TOPOLOGY", "/nowhere")
    for name, value in variables.items():
        monkeypatch.setenv(f"REMOE_MAIN_{name}", value)
    return MainSettings.read()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("natively", [True, False])
def test_the_setting_gives_the_expert_functions_answers(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: NativePool,
    natively: bool,
    dtype: RowDtype,
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    settings = settings_of(monkeypatch, TRANSPORT="in-process")
    transport = open_transport(settings, NOWHERE, checkpoint, pool if natively else None)
    assert isinstance(transport, InProcessTransport)
    hidden = np.linspace(-1, 1, 3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)
    call = in_dtype(
        expert_call(checkpoint.digest, hidden, {0: [(0, 0.5), (2, 0.25)], 2: [(1, 1.0)]}), dtype
    )
    result = transport.send(call, deadline_s=5.0).result()
    expected = ExpertComputer(checkpoint, first_layer=0, last_layer=0).compute(call)
    np.testing.assert_allclose(sums(result.partial, 3), sums(expected, 3), rtol=1e-5, atol=1e-5)
    assert result.busy_s > 0
    assert result.bytes_moved == 0
    transport.close()


def in_dtype(call: ExpertCall, dtype: RowDtype) -> ExpertCall:
    """The same rows, cut off (bfloat16) or rounded to the type."""
    rows = np.frombuffer(call.hidden, "<f4")
    stored = {
        "float32": rows,
        "bfloat16": (rows.view("<u4") >> 16).astype("<u2"),
        "float16": rows.astype("<f2"),
    }[dtype]
    assert stored.itemsize == ITEM_BYTES[dtype]
    return msgspec.structs.replace(call, dtype=dtype, hidden=stored.tobytes())


def test_http_is_what_nobody_has_to_ask_for(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    transport = open_transport(settings_of(monkeypatch), NOWHERE, checkpoint, None)
    assert isinstance(transport, HttpTransport)
    transport.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("TRANSPORT", "carrier-pigeon"), ("PAYLOAD_LIMIT_BYTES", "100"), ("HEDGE_FLOOR_S", "0")],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"REMOE_MAIN_{name}"):
        settings_of(monkeypatch, **{name: value})
