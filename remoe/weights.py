"""Fill a folder with a model before functions start: `python -m remoe.weights SOURCE TARGET`.

What an init container runs. SOURCE is a folder or `hub:owner/name[@revision]`. The folder appears
whole or not at all: files are put beside it and renamed, so that several pods of a node may load at
once, and one that finds the right model there does nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from remoe.checkpoint import Checkpoint
from remoe.errors import CheckpointError

__all__ = ["fill"]


def fill(source: str, target: Path, *, digest: str | None = None) -> bool:
    """Put the model at `target`; False if it was there. Raises CheckpointError.

    A folder of other weights, or a damaged one, is replaced; functions that have mapped its files
    keep them until they end.
    """
    if _holds(target, digest):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _fetch(source, beside)
        _check(beside, source, digest)
        beside.chmod(0o755)
        _put(beside, target, digest)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _holds(folder: Path, digest: str | None) -> bool:
    try:
        found = Checkpoint.open(folder).digest
    except CheckpointError:
        return False
    return digest in {None, found}


def _check(folder: Path, source: str, digest: str | None) -> None:
    found = Checkpoint.open(folder).digest
    if digest not in {None, found}:
        raise CheckpointError(f"{source} holds {found}, and {digest} was asked for")


def _fetch(source: str, folder: Path) -> None:
    if source.startswith("hub:"):
        from remoe.model_folder import model_folder

        found = model_folder(source.removeprefix("hub:"))
    else:
        found = Path(source)
    if not found.is_dir():
        raise CheckpointError(f"{found} is not a folder; the weights' source must be one")
    for path in found.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)  # follows links, as the hub's cache has them


def _put(folder: Path, target: Path, digest: str | None) -> None:
    """Rename into place; whoever was first wins, if they brought the same."""
    try:
        folder.rename(target)
    except OSError:
        if _holds(target, digest):
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / target.name)
        try:
            folder.rename(target)
        finally:
            shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m remoe.weights", description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--digest")
    given = parser.parse_args()
    os.umask(0o022)
    try:
        loaded = fill(given.source, given.target, digest=given.digest)
    except (CheckpointError, OSError) as error:
        sys.exit(f"cannot load the weights: {error}")
    sys.stdout.write(f"{given.target}: {'loaded' if loaded else 'there already'}\n")


if __name__ == "__main__":
    main()
