"""What tests of several folders share: a tiny random MoE checkpoint, and the native library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from remoe.kernel.native.build import build, compiler
from remoe.kernel.native_library import NativePool
from tests.tiny_model import build_tiny_checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--crash-kills", type=int, default=15, help="how often a crash test kills the planner"
    )
    parser.addoption(
        "--nightly", action="store_true", help="run what takes minutes in its whole length too"
    )


@pytest.fixture
def crash_kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--crash-kills"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 3 layers with 4 experts and random float32 weights, as published ones look."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny-mixtral"))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C compiler")
    return build(tmp_path_factory.mktemp("native") / "libremoe_kernel.so")


@pytest.fixture(scope="session")
def pool(library: Path) -> Iterator[NativePool]:
    """Native threads of the best variant this machine runs."""
    opened = NativePool(threads=2, library=library)
    yield opened
    opened.close()
