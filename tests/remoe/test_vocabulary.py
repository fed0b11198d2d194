from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray

from remoe.errors import ContextLengthError, RemoeError, SettingsError
from remoe.experts import ActivationProfile, ExpertId, Partition
from remoe.ledger import Ledger
from remoe.prices import DEFAULT_PRICES
from remoe.settings import ServiceSettings
from remoe.topology import ExpertEndpoint, Topology


@given(counts=stn.arrays(np.int64, (3, 5), elements=st.integers(0, 10_000)))
def test_profiles_from_counts_have_rows_that_sum_to_one(counts: NDArray[np.int64]) -> None:
    shares = ActivationProfile.from_counts(counts).shares
    for row, total in zip(shares, counts.sum(axis=1), strict=True):
        assert row.sum() == pytest.approx(1.0 if total else 0.0, abs=1e-5)


def test_a_profile_that_does_not_sum_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sums to 1"):
        ActivationProfile(np.full((2, 2), 0.7, np.float32))


@given(remote=st.lists(st.sets(st.integers(0, 6)).map(lambda s: tuple(sorted(s))), min_size=1))
def test_local_and_remote_experts_make_up_the_model(remote: list[tuple[int, ...]]) -> None:
    partition = Partition(experts=7, remote=tuple(remote))
    locals_ = sum(len(partition.local(layer)) for layer in range(partition.layers))
    assert locals_ + partition.remote_count == 7 * len(remote)
    for layer, indices in enumerate(remote):
        assert sorted([*indices, *partition.local(layer)]) == list(range(7))
    assert set(partition.remote_ids()) == {
        ExpertId(layer, index) for layer, indices in enumerate(remote) for index in indices
    }
    assert msgspec.json.decode(msgspec.json.encode(partition), type=Partition) == partition


@pytest.mark.parametrize("remote", [((1, 0),), ((1, 1),), ((4,),), ((-1,),)])
def test_bad_partitions_are_refused(remote: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="layer 0"):
        Partition(experts=4, remote=remote)


def test_cost_is_the_sum_of_its_parts_at_the_books_prices() -> None:
    cost = Ledger(main_gpu_gb_s=2.0, main_cpu_gb_s=3.0, remote_gb_s=5.0).cost(DEFAULT_PRICES)
    assert cost.main_gpu_usd == pytest.approx(2 * 4.2e-5)
    assert cost.main_cpu_usd == pytest.approx(3 * 2.3e-5)
    assert cost.remote_usd == pytest.approx(5 * 2.3e-5)
    assert cost.total_usd == cost.main_gpu_usd + cost.main_cpu_usd + cost.remote_usd


def test_every_error_renders_openais_envelope() -> None:
    error = ContextLengthError("too long", param="messages")
    assert error.envelope() == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    }
    classes: list[type[RemoeError]] = [RemoeError]
    while classes:
        kind = classes.pop()
        assert 400 <= kind.status < 600
        assert kind.code is None or isinstance(kind.code, str)
        classes += kind.__subclasses__()


def test_topology_round_trip_and_lookup(tmp_path: Path) -> None:
    topology = Topology(
        model="m",
        model_dir="/models/m",
        gateway_url="http://g",
        planner_url="http://p",
        main_url="http://f",
        main_memory_gb=1.5,
        experts=[
            ExpertEndpoint(name="a", url="http://a", first_layer=0, last_layer=1, memory_gb=0.5),
            ExpertEndpoint(name="b", url="http://b", first_layer=2, last_layer=2, memory_gb=0.5),
        ],
    )
    topology.save(tmp_path / "topology.json")
    assert Topology.load(tmp_path / "topology.json") == topology
    assert [topology.expert_for(layer).name for layer in range(3)] == ["a", "a", "b"]
    with pytest.raises(SettingsError, match="layer 3"):
        topology.expert_for(3)


def test_a_bad_topology_file_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "topology.json").write_text('{"model": 3}')
    with pytest.raises(SettingsError, match=r"topology.json is not a topology.*model"):
        Topology.load(tmp_path / "topology.json")
    with pytest.raises(SettingsError, match="REMOE_TOPOLOGY"):
        Topology.load(tmp_path / "absent.json")


def test_bad_settings_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMOE_TOPOLOGY", raising=False)
    monkeypatch.setenv("REMOE_LOG_LEVEL", "chatty")
    with pytest.raises(SettingsError, match=r"(?s)REMOE_TOPOLOGY.*REMOE_LOG_LEVEL"):
        ServiceSettings.read()
