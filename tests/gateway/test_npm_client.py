"""OpenAI's npm client against the gateway; skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gateway.conftest import Stack
from tests.gateway.tiny_text import MODEL

PACKAGE = "openai@6.49.0"
SCRIPT = Path(__file__).with_name("conformance.mjs")


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client in it: the one named by REMOE_NPM_FOLDER, or a fresh install."""
    if folder := os.environ.get("REMOE_NPM_FOLDER"):
        return Path(folder)
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder_path = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
    try:
        done = subprocess.run(
            command, cwd=folder_path, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} could not be installed within 60 s")
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder_path


def test_the_npm_client(stack: Stack, npm_folder: Path) -> None:
    script = npm_folder / SCRIPT.name
    shutil.copy(SCRIPT, script)
    done = subprocess.run(
        ["node", str(script), f"{stack.url}/v1", MODEL],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == SCRIPT.read_text("utf-8").count("\n  async ")
