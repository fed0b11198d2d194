"""Settings: every mistake is named, in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from expert_fn.config import ExpertSettings
from remoe.errors import SettingsError

GOOD = {
    "REMOE_TOPOLOGY": "/nowhere/topology.json",
    "REMOE_EXPERT_FIRST_LAYER": "2",
    "REMOE_EXPERT_LAST_LAYER": "5",
}


def test_defaults_and_given_values() -> None:
    settings = ExpertSettings.read({**GOOD, "REMOE_EXPERT_KERNEL": "numpy"})
    assert (settings.first_layer, settings.last_layer) == (2, 5)
    assert (settings.kernel, settings.threads, settings.log_level) == ("numpy", 1, "info")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"REMOE_EXPERT_FIRST_LAYER": "-1"}, r"REMOE_EXPERT_FIRST_LAYER: .*>= 0.*'-1'"),
        ({"REMOE_EXPERT_LAST_LAYER": "five"}, r"REMOE_EXPERT_LAST_LAYER: .*int.*'five'"),
        ({"REMOE_EXPERT_LAST_LAYER": "1"}, "REMOE_EXPERT_LAST_LAYER: is below"),
        ({"REMOE_EXPERT_THREADS": "0"}, r"REMOE_EXPERT_THREADS: .*>= 1"),
        ({"REMOE_EXPERT_KERNEL": "cuda"}, "REMOE_EXPERT_KERNEL: .*'cuda'"),
        ({"REMOE_LOG_LEVEL": "loud"}, "REMOE_LOG_LEVEL: .*'loud'"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ExpertSettings.read(GOOD | change)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        ExpertSettings.read({"REMOE_EXPERT_THREADS": "many"})
    for variable in (*GOOD, "REMOE_EXPERT_THREADS"):
        assert variable in raised.value.message


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expert_fn", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_the_program_shows_its_configuration_or_what_is_wrong() -> None:
    shown = run_module("--print-config", **GOOD)
    assert json.loads(shown.stdout)["last_layer"] == 5
    wrong = run_module(**GOOD, REMOE_EXPERT_THREADS="0")
    assert wrong.returncode == 1
    assert "REMOE_EXPERT_THREADS" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_program_imports_no_framework() -> None:
    """What would double the time from spawn to ready."""
    code = "import sys, expert_fn.__main__; print([m for m in sys.modules if '.' not in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    for module in ("pydantic", "structlog", "rich", "torch", "fastapi"):
        assert f"'{module}'" not in done.stdout
