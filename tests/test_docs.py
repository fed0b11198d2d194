"""Documentation that repeats code is checked against it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from remoe.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/update.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_relative_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_number_of_families_in_the_readme_is_that_of_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{len(FAMILIES)} families of MoE models](docs/models.md)" in readme
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"[{len(FAMILIES)} MoE families](docs/models.md)" in changelog
