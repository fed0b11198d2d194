"""What a decoded token takes in a real engine: with every expert here, and with every one remote.

The difference is what calls cost where they are made: a step that is one native call otherwise is
interrupted in each layer, and on one machine the functions called share its cores. A call alone,
of an idle process to another, shows neither (`call_times.py`).
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import torch

from main_model_fn.config import MainSettings
from main_model_fn.engine import Engine, EngineLimits
from main_model_fn.metering import StepMeter
from main_model_fn.native_threads import open_pool
from main_model_fn.served_model import load_served_model
from main_model_fn.transport import ExpertTransport
from remoe.checkpoint import Checkpoint
from remoe.experts import Partition
from remoe.generation import GenerateRequest, SamplingParams

__all__ = ["measure_step"]

_PROMPT_TOKENS, _WARM_UP_TOKENS = 32, 8
_LIMITS = EngineLimits(kv_tokens=512, page_tokens=32, batch_tokens=256, max_requests=1, max_queue=4)


def measure_step(
    model_dir: Path, transport: ExpertTransport, *, remote: bool, tokens: int = 40
) -> float:
    """Median seconds between two tokens of one stream on the CPU, after a prompt of random tokens.

    With `remote` every expert is behind `transport`, else none.
    """
    checkpoint = Checkpoint.open(model_dir)
    device = torch.device("cpu")
    every = tuple(range(checkpoint.experts)) if remote else ()
    meter = StepMeter(layers=checkpoint.layers, experts=checkpoint.experts, main_memory_gb=1.0)
    model = load_served_model(
        model_dir,
        partition=Partition(
            experts=checkpoint.experts,
            remote=tuple(
                every if layer in checkpoint.moe_layers else ()
                for layer in range(checkpoint.layers)
            ),
        ),
        dtype=None,
        device=device,
        transport=transport,
        function_memory_gb=dict.fromkeys(checkpoint.moe_layers, 1.0),
        meter=meter,
        pool=open_pool(MainSettings.model_construct(kernel="auto", threads=0), device),
    )
    engine = Engine(model, meter, limits=_LIMITS, deployment_plan_id="profile")
    engine.start()
    try:
        times = asyncio.run(_token_times(engine, checkpoint, tokens))
    finally:
        engine.stop()
    return float(np.median(np.diff(times[_WARM_UP_TOKENS:])))


async def _token_times(engine: Engine, checkpoint: Checkpoint, tokens: int) -> list[float]:
    prompt = np.random.default_rng(0).integers(0, checkpoint.vocab_size, _PROMPT_TOKENS)
    request = GenerateRequest(
        request_id="profile",
        plan_id=None,
        prompt_tokens=prompt.tolist(),
        max_new_tokens=_WARM_UP_TOKENS + tokens,
        stop_tokens=[],
        sampling=SamplingParams(temperature=0),
    )
    return [time.perf_counter() async for event in engine.generate(request) if event.tokens]
