"""Write what documentation repeats from code: modules, model families, and the commands' help.

`make docs` updates the files; `--check` fails if they are out of date, and the tests run that.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from remoe.cli import app
from remoe.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "remoe",
    "gateway",
    "planner",
    "main_model_fn",
    "expert_fn",
    "knative",
    "loadgen",
    "models",
    "evaluation",
)


def module_table() -> str:
    """One line a module, from its docstring's first line."""
    lines = []
    for package in PACKAGES:
        lines += ["", f"### `{package}/`", "", "| Module | Is |", "|---|---|"]
        for path in sorted((ROOT / package).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if path.name == "__init__.py" and path.parent != ROOT / package:
                continue
            if docstring:
                name = path.relative_to(ROOT / package)
                lines.append(f"| `{name}` | {docstring.splitlines()[0]} |")
    return "\n".join([*lines, ""])


def family_table() -> str:
    """One line a supported family of models."""
    lines = [
        "",
        "| `model_type` | Models | Experts in the checkpoint | Requests run |",
        "|---|---|---|---|",
    ]
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type):
        served = "one at a time" if family.recurrent else "all at once"
        layout = f"{family.layout.summary}: `{family.layout.down.split('.', 3)[3]}`"
        lines.append(f"| `{family.model_type}` | {family.title} | {layout} | {served} |")
    return "\n".join([*lines, "", ""])


def command_help() -> str:
    """`--help` of the command and each sub-command, as a user sees it."""
    runner = CliRunner()
    sections = []
    waiting: list[list[str]] = [[]]
    while waiting:
        words = waiting.pop(0)
        result = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "90", "NO_COLOR": "1"})
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
        text = "\n".join(line.rstrip() for line in text.strip().splitlines())
        sections.append(f"## `{' '.join(['remoe', *words])}`\n\n```text\n{text}\n```\n")
        commands = re.search(r"─ Commands ─+╮\n(.*?)\n╰", text, re.DOTALL)
        if commands:
            names = re.findall(r"^│ (\S+) ", commands.group(1), re.MULTILINE)
            waiting += [[*words, name] for name in names]
    return "# The `remoe` command\n\n" + "\n".join(sections)


def _filled(page: str, mark: str, text: str) -> str:
    """The page with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced."""
    return re.sub(
        rf"(<!-- {mark} -->\n).*(<!-- /{mark} -->)",
        lambda found: f"{found.group(1)}{text}{found.group(2)}",
        (ROOT / "docs" / page).read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


def main() -> None:
    wanted = {
        ROOT / "docs" / "architecture.md": _filled("architecture.md", "modules", module_table()),
        ROOT / "docs" / "models.md": _filled("models.md", "families", family_table()),
        ROOT / "docs" / "cli.md": command_help(),
    }
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"{names}: out of date; run `make docs`")
        return
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")


if __name__ == "__main__":
    main()
