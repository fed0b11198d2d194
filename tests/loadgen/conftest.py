"""What the load generator's tests share; the gateway and its fakes are those of the gateway."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.conftest import (
    _patient_url,
    _silent_logs,
    _upstreams,
    model_dir,
    stack,
    tokenizer,
)
from tests.loadgen.servers import null_server

__all__ = ["_patient_url", "_silent_logs", "_upstreams", "model_dir", "stack", "tokenizer"]


@pytest.fixture(scope="session")
def null_url() -> Iterator[str]:
    """A server that answers in 20 ms and then a word each 2 ms."""
    with null_server(ttft_s=0.02, itl_s=0.002) as url:
        yield url
