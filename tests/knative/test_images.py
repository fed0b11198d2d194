"""Every service has an image, and each Containerfile asks for what the service needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
MODULES = {
    "gateway": "gateway",
    "planner": "planner",
    "main": "main_model_fn",
    "expert": "expert_fn",
}


def wanted(extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(IMAGES / "requirements.py"), str(ROOT / "pyproject.toml"), extra],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_image_holds_its_service_alone_and_runs_it_unprivileged(name: str, module: str) -> None:
    text = (IMAGES / f"{name}.Containerfile").read_text(encoding="utf-8")
    last = text.rpartition("\nFROM ")[2]
    copied = re.findall(r"^COPY (\w+) /app/(\w+)$", last, re.MULTILINE)
    assert copied == [("remoe", "remoe"), (module, module)]
    assert f'ENTRYPOINT ["python", "-m", "{module}"]' in last
    user = re.search(r"^USER (\d+):\d+$", last, re.MULTILINE)
    assert user
    assert int(user[1]) > 0
    # What the build context leaves out cannot be copied.
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert any(f"!{source}".startswith(kept) for kept in context if kept[0] == "!"), source


@pytest.mark.parametrize("name", MODULES)
def test_image_installs_its_extra(name: str) -> None:
    text = (IMAGES / f"{name}.Containerfile").read_text(encoding="utf-8")
    extra = re.search(r"pyproject\.toml ([\w-]+) >", text)
    assert extra
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = wanted(extra[1]).stdout.splitlines()
    assert lines == project["dependencies"] + project["optional-dependencies"][extra[1]]
    assert any(line.startswith("torch") for line in lines) == (name == "main")


def test_unknown_extra_is_refused_with_the_known_ones() -> None:
    done = wanted("gatewya")
    assert done.returncode != 0
    assert "gateway" in done.stderr
