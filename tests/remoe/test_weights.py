"""Filling a volume with a model: whole or not at all, and the right one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.weights import fill


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_empty_volume_is_filled_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "tiny"
    digest = Checkpoint.open(tiny_model_dir).digest
    assert fill(str(tiny_model_dir), target, digest=digest)
    assert names(target) >= {path.name for path in tiny_model_dir.iterdir() if path.is_file()}
    assert target.stat().st_mode & 0o755 == 0o755
    assert not fill(str(tiny_model_dir), target, digest=digest)
    assert names(target.parent) == {"tiny"}


def test_other_weights_are_refused_and_leave_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was asked for"):
        fill(str(tiny_model_dir), tmp_path / "tiny", digest="sha256:other")
    assert names(tmp_path) == set()
    with pytest.raises(CheckpointError, match="not a folder"):
        fill(str(tmp_path / "none"), tmp_path / "tiny")


def test_a_damaged_folder_is_replaced(tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    shutil.copytree(tiny_model_dir, target)
    (target / "config.json").unlink()
    digest = Checkpoint.open(tiny_model_dir).digest
    assert fill(str(tiny_model_dir), target, digest=digest)
    assert Checkpoint.open(target).digest == digest
    assert names(tmp_path) == {"tiny"}


def test_pods_that_load_at_once_agree(tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    digest = Checkpoint.open(tiny_model_dir).digest
    with ThreadPoolExecutor(8) as pods:
        list(pods.map(lambda _: fill(str(tiny_model_dir), target, digest=digest), range(8)))
    assert Checkpoint.open(target).digest == digest
    assert names(tmp_path) == {"tiny"}


def test_the_loader_says_what_it_did(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remoe.weights", str(tiny_model_dir), str(tmp_path / "t")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True)
    assert loaded.stdout.endswith("loaded\n")
    failed = subprocess.run(
        [*command, "--digest", "sha256:x"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert "cannot load the weights" in failed.stderr
