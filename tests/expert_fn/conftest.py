"""The native library, compiled from the sources at hand, for tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_fn.native.build import build, compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C compiler")
    return build(tmp_path_factory.mktemp("native") / "libremoe_expert.so")
