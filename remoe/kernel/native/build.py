"""Compile the native kernel: `python -m remoe.kernel.native.build`, or the install (hatch_build.py).

One library for every machine of an architecture: the arithmetic is compiled once per instruction
set, and the library chooses when it is opened. Only the standard library is imported, because the
install runs this file before anything else is there.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["BuildError", "build", "compiler"]

_HERE = Path(__file__).resolve().parent
_LIBRARY = _HERE / "libremoe_kernel.so"
# No contraction: the sources say where a multiply-add is fused, so that a result does not depend
# on which loop the compiler happened to fuse.
_FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
_SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl"]
# The fastest first.
_VARIANTS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16"],
        "avx512": _AVX512,
        "avx2": _AVX2,
        "portable": ["-DPORTABLE"],
    },
    "aarch64": {"neon": [], "portable": ["-DPORTABLE"]},
}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """There is no compiler, or it failed; the message holds its words."""


def compiler() -> list[str] | None:
    """$CC, or the system's C compiler; None if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    return next((words for words in candidates if shutil.which(words[0])), None)


def build(target: Path = _LIBRARY, *, sanitize: bool = False) -> Path:
    """Compile and link into `target`, replacing it at once or not at all; raises BuildError."""
    cc = compiler()
    if cc is None:
        raise BuildError("no C compiler found (cc, gcc or clang; or set CC)")
    flags = _FLAGS + (_SANITIZE if sanitize else [])
    machine = platform.machine().lower()
    variants = _VARIANTS.get(_ALIASES.get(machine, machine), {"portable": ["-DPORTABLE"]})
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = {}
        for name, instructions in variants.items():
            made = f"{folder}/{name}.o"
            source = ["-c", str(_HERE / "variant.c"), "-o", made]
            try:
                _run([*cc, *flags, *instructions, f"-DVARIANT={name}", *source])
                objects[name] = made
            except BuildError:
                if name == "portable":  # an older compiler may lack the others' instructions
                    raise
        listed = " ".join(f"X({name})" for name in objects)
        for name in ("kernel", "aside", "idle_polling"):
            objects[name] = f"{folder}/{name}.o"
            source = ["-c", str(_HERE / f"{name}.c"), "-o", objects[name]]
            _run([*cc, *flags, f"-DVARIANTS={listed}", *source])
        linked = f"{folder}/linked.so"
        _run([*cc, *flags, "-shared", *objects.values(), "-o", linked, "-lm", "-pthread"])
        Path(linked).replace(target)
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}:\n{done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the native kernel.")
    parser.add_argument("--sanitize", action="store_true", help="with address and UB sanitizers")
    parser.add_argument("--output", type=Path, default=_LIBRARY, help="default: %(default)s")
    given = parser.parse_args()
    try:
        sys.stdout.write(f"built {build(given.output, sanitize=given.sanitize)}\n")
    except BuildError as error:
        sys.exit(f"cannot build the native kernel: {error}")


if __name__ == "__main__":
    main()
