"""Continuous batching whose inputs lie on the host, for a pass that takes them from there.

On the GPU each small array that the library prepares for a step is a few launches and a copy: a
third of a millisecond a token in which nothing else happens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

__all__ = ["keep_inputs_on_host", "moved"]


def keep_inputs_on_host(processor: ContinuousBatchProcessor) -> None:
    """Have a processor prepare steps in pinned memory; the model's pass is to fetch them."""
    there = processor.inputs_and_outputs
    if there.device.type == "cpu":
        return
    here = ContinuousBatchingIOs(
        cache=processor.cache,
        config=processor.config,
        continuous_batching_config=processor.cb_config,
        device=torch.device("cpu"),
        model_dtype=processor.model_dtype,
        logit_processor=processor.logit_processor,
    )
    here.compute_stream = there.compute_stream
    processor.inputs_and_outputs = processor.model_runner.inputs_and_outputs = here


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, also within lists and dictionaries, on a device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    return value
