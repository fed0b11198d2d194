from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from main_model_fn.engine import Engine, EngineLimits
from tests.tiny_model import InProcessTransport, new_meter, reference, split

LIMITS = EngineLimits(kv_tokens=1024, page_tokens=16, batch_tokens=64, max_requests=8, max_queue=8)


@pytest.fixture(scope="module")
def unmodified(tiny_model_dir: Path) -> PreTrainedModel:
    return reference(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[Engine]:
    """A split model with some experts remote; steps of 64 tokens, pages of 16."""
    remote = ((0, 1), (2, 3), (0, 3))
    meter = new_meter()
    model = split(tiny_model_dir, remote, InProcessTransport(tiny_model_dir), meter)
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test")
    engine.start()
    yield engine
    engine.stop()
