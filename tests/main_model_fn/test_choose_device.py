"""Where a main function computes, as the settings and the machine say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from main_model_fn.choose_device import choose_device, hot_budget
from main_model_fn.config import MainSettings
from main_model_fn.deployment import claim_deployment
from remoe.checkpoint import Checkpoint
from remoe.errors import SettingsError

Read = Callable[..., MainSettings]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    def settings(**given: str) -> MainSettings:
        monkeypatch.setenv("REMOE_TOPOLOGY", str(tmp_path))
        for name, value in given.items():
            monkeypatch.setenv(f"REMOE_MAIN_{name.upper()}", value)
        return MainSettings.read()

    return settings


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(read: Read) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SettingsError, match="REMOE_MAIN_DEVICE is cuda, but torch sees no GPU"):
        choose_device(read(device="cuda"))
    assert choose_device(read(device="auto")).type == "cpu"


def test_the_gpus_share_of_experts_is_the_settings_and_the_plans(
    read: Read, tiny_model_dir: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_model_dir)
    deployment = claim_deployment("http://127.0.0.1:9", checkpoint, main_memory_gb=1)
    asked = read(gpu_experts_gb="1.5")
    assert hot_budget(asked, checkpoint, deployment, torch.device("cpu")) is None
    budget = hot_budget(asked, checkpoint, deployment, torch.device("cuda"))
    assert budget is not None
    assert (budget.size_bytes, budget.profile) == (1_500_000_000, None)
