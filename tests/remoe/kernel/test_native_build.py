"""Building the native kernel: without a compiler, with sanitizers, and what those find."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from remoe.cli.native_warning import warn_without_native_kernel
from remoe.expert_tensors import ExpertTensors
from remoe.experts import ExpertId
from remoe.kernel.interface import open_kernel
from remoe.kernel.native.build import BuildError, build, compiler
from remoe.kernel.native_library import native_problem


def test_without_a_compiler_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="no C compiler"):
        build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_leaves_the_old_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "library.so"
    old.write_bytes(b"old")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match=r"variant\.c|kernel\.c"):
        build(old)
    assert [path.name for path in tmp_path.iterdir()] == ["library.so"]
    assert old.read_bytes() == b"old"


def test_a_stale_library_is_said_to_be_one_and_how_to_mend_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    cc = compiler()
    if cc is None:
        pytest.skip("no C compiler")
    source, stale = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text("long remoe_kernel_abi(void) { return 1; }\n", encoding="utf-8")
    subprocess.run([*cc, "-shared", "-fPIC", str(source), "-o", str(stale)], check=True)
    mend = r"stale.*python -m remoe\.kernel\.native\.build"
    assert re.search(mend, native_problem(stale) or "")
    assert native_problem(build(tmp_path / "fresh.so")) is None
    with caplog.at_level(logging.WARNING):
        assert open_kernel(_no_expert, library=stale).description == "numpy"
    (record,) = caplog.records
    assert record.message == "native_kernel_unavailable"
    assert re.search(mend, record.__dict__["error"])
    warn_without_native_kernel(stale)
    assert re.search(mend, capsys.readouterr().err)


def _no_expert(expert: ExpertId) -> ExpertTensors:
    raise AssertionError(f"{expert} is not called")


def test_sanitizers_find_nothing_in_a_fuzz(tmp_path: Path) -> None:
    cc = compiler()
    if cc is None:
        pytest.skip("no C compiler")
    words = [*cc, "-print-file-name=libasan.so"]
    runtime = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    library = build(tmp_path / "sanitized.so", sanitize=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.remoe.kernel.fuzz_kernel", str(library), "5"],
        env={
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 10
