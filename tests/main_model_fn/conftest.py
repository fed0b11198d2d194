from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from main_model_fn.engine import Engine, EngineLimits
from remoe.kernel.native_library import NativePool
from tests.tiny_model import InProcessTransport, native, new_meter, reference, split

LIMITS = EngineLimits(kv_tokens=1024, page_tokens=16, batch_tokens=64, max_requests=8, max_queue=8)


@pytest.fixture(scope="module")
def unmodified(tiny_model_dir: Path) -> PreTrainedModel:
    return reference(tiny_model_dir)


@pytest.fixture(scope="module", params=["library", "native"])
def engine(
    request: pytest.FixtureRequest, tiny_model_dir: Path, pool: NativePool
) -> Iterator[Engine]:
    """A split model with some experts remote; steps of 64 tokens, pages of 16."""
    remote = ((0, 1), (2, 3), (0, 3))
    meter, transport = new_meter(), InProcessTransport(tiny_model_dir)
    model: Any = (
        split(tiny_model_dir, remote, transport, meter)
        if request.param == "library"
        else native(tiny_model_dir, remote, transport, meter, pool)
    )
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    yield engine
    engine.stop()
