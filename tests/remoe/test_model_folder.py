"""Models by folder and by hub id; the hub's cache is filled as a download fills it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from knative.deployment import model_name
from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError
from remoe.model_folder import model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--tiny--mixtral"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_model_dir, repository / "snapshots" / COMMIT)
    return tmp_path


def test_a_folder_is_itself(tiny_model_dir: Path) -> None:
    assert model_folder(str(tiny_model_dir)) == tiny_model_dir


@pytest.mark.parametrize("given", ["tiny/mixtral", f"tiny/mixtral@{COMMIT}"])
def test_a_hub_id_is_the_folder_of_its_snapshot(
    given: str, offline_hub: Path, tiny_model_dir: Path
) -> None:
    folder = model_folder(given)
    assert folder == offline_hub / "models--tiny--mixtral" / "snapshots" / COMMIT
    assert model_name(folder) == "mixtral"
    assert Checkpoint.open(folder).digest == Checkpoint.open(tiny_model_dir).digest


@pytest.mark.usefixtures("offline_hub")
def test_what_is_nowhere_is_refused_with_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"nobody/nothing is neither.*HF_TOKEN"):
        model_folder("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"no-such-folder is not a folder.*hub id"):
        model_folder("no-such-folder")
