"""Write what documentation repeats from code: the module table and the commands' help.

`make docs` updates the files; `--check` fails if they are out of date, and the tests run that.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from remoe.cli import app

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


def main() -> None:
    architecture = ROOT / "docs" / "architecture.md"
    marked = r"(<!-- modules -->\n).*(<!-- /modules -->)"
    table = module_table()
    wanted = {
        architecture: re.sub(
            marked,
            lambda found: f"{found.group(1)}{table}{found.group(2)}",
            architecture.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        ),
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
