"""What tests of several folders share: a tiny random MoE checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import build_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 3 layers with 4 experts and random float32 weights, as published ones look."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny-mixtral"))
