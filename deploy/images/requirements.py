"""Print what one service needs: `python requirements.py pyproject.toml EXTRA`, for pip's -r.

An image installs these by themselves, so that its layer stays as it is when only our code changes.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    path, extra = sys.argv[1:]
    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if extra not in extras:
        sys.exit(f"{path} has no extra {extra!r}; it has {', '.join(sorted(extras))}")
    sys.stdout.write("\n".join([*project["dependencies"], *extras[extra]]) + "\n")


if __name__ == "__main__":
    main()
