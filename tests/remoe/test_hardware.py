from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remoe.errors import SettingsError
from remoe.hardware import AllocationCurve, ExponentialFit, HardwareProfile, Spread, newest_profile
from tests.remoe.hardware_profiles import some_profile

VCPUS = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(("theta1", "theta2", "theta3"), [(2.0, 2.4363, 0.3), (0.5, 11.8665, 0.1)])
def test_an_exponential_is_found_again(theta1: float, theta2: float, theta3: float) -> None:
    vcpus = np.array(VCPUS)
    seconds = theta1 * np.exp(-theta2 * vcpus) + theta3
    fit = ExponentialFit.of(vcpus, seconds)
    assert fit.r_squared > 0.999
    assert fit.seconds(vcpus) == pytest.approx(seconds, rel=0.02)
    assert min(fit.theta1, fit.theta2, fit.theta3) > 0


def test_a_fit_that_explains_too_little_gives_way_to_the_table() -> None:
    steps = [4.0, 4.0, 1.0, 1.0, 3.9, 1.0]
    curve = AllocationCurve.of(VCPUS, steps)
    assert curve.fit is None
    assert curve.seconds(np.array(VCPUS)) == pytest.approx(steps)
    flat = AllocationCurve.of(VCPUS, [1.0] * 6)
    assert flat.fit is None
    assert flat.seconds(np.array([0.5, 2.0, 8.0])) == pytest.approx([1, 1, 1])


def test_outside_the_measured_range() -> None:
    curve = AllocationCurve.of(VCPUS, [4.0, 2.0, 4 / 3, 1.0, 2 / 3, 0.5])
    assert curve.seconds(np.array([0.125]))[0] == pytest.approx(8.0)
    assert curve.seconds(np.array([16.0]))[0] == pytest.approx(curve.seconds(np.array([2.0]))[0])


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    older = some_profile(measured_at="2026-01-02T03:04:05Z")
    newer = some_profile(measured_at="2026-11-02T03:04:05Z")
    path = newer.save(tmp_path)
    older.save(tmp_path)
    assert newest_profile(tmp_path, newer.model) == path
    assert path.name == "20261102T030405Z-tiny-moe.json"
    assert HardwareProfile.load(path) == newer
    assert newest_profile(tmp_path, "another") is None


def test_what_is_no_profile_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="remoe profile hardware"):
        HardwareProfile.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"{}")
    with pytest.raises(SettingsError, match="not a hardware profile"):
        HardwareProfile.load(tmp_path / "bad.json")


def test_a_spread_is_what_numpy_says() -> None:
    spread = Spread.of(np.arange(101, dtype=np.float64))
    assert (spread.median_s, spread.p95_s, spread.p975_s, spread.mean_s) == (50, 95, 97.5, 50)
