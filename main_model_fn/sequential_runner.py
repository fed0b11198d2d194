"""One stream after another, each through transformers' `generate` with the model's own cache.

For models with layers whose state is no key-value cache (linear attention, state spaces,
convolutions), which continuous batching has no room for. Slower when several wait; otherwise the
same: `Steps` meters and chooses tokens here too.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from main_model_fn.runner import EngineLimits
from main_model_fn.runner_thread import RunnerThread
from main_model_fn.steps import Part, Steps
from main_model_fn.stream import Stream

__all__ = ["SequentialRunner"]


class SequentialRunner(RunnerThread):
    """Runs streams in the order they came."""

    def __init__(self, model: PreTrainedModel, steps: Steps, limits: EngineLimits) -> None:
        super().__init__()
        self._model = model
        self._steps = steps
        self._running: Stream | None = None
        self._position = 0
        self._stopping = False
        model.generation_config.eos_token_id = None  # streams know when they have ended
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def stop(self) -> None:
        self._stopping = True
        super().stop()

    def _serve(self) -> None:
        while (stream := self._come.get()) is not None:
            self._running = stream
            if not stream.ended and not self._stopping:
                self._generate(stream)
            stream.fail()  # which changes nothing unless it was stopped
            self._running = None

    def _taken(self) -> list[Stream]:
        return [] if self._running is None else [self._running]

    def _generate(self, stream: Stream) -> None:
        self._position = 0
        prompt = torch.tensor([stream.request.prompt_tokens], device=self._model.device)
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=stream.max_new_tokens,
                do_sample=False,
                pad_token_id=0,  # `generate` wants one, and pads nothing
            ),
            logits_processor=LogitsProcessorList([_Choice(self._steps)]),
            stopping_criteria=StoppingCriteriaList([self._is_over]),
        )

    def _before_forward(
        self, _model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._running is None or threading.current_thread() is not self._thread:
            return
        rows = kwargs["input_ids"].shape[1]
        self._steps.begin([Part(self._running, self._position, rows, yields_token=True)])
        self._position += rows

    def _is_over(self, input_ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        over = self._stopping or self._running is None or self._running.ended
        return torch.tensor([over], device=input_ids.device)


class _Choice(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._steps.end(scores)
        return scores
