"""What a plan takes for granted, and what a preview may suppose instead.

See papers.md A.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import msgspec
import numpy as np

from planner.calibration import Drift
from planner.config import PlannerSettings
from planner.forecast import Workload
from planner.measurements import Measurements
from planner.model import ModelFacts
from planner.optimise.measured_system import SystemRules
from planner.optimise.whole_plan import RatioRule
from planner.phases import PhaseProfiles
from planner.plan_making import Question
from remoe.errors import InvalidRequestError
from remoe.experts import Partition
from remoe.plan import PlanRequest, Slo
from remoe.planning_messages import PreviewRequest
from remoe.prices import PriceBook

__all__ = ["WhatIf", "WhatIfs"]


class _Asked(TypedDict):
    profiles: PhaseProfiles
    workload: Workload
    longest_tokens: int
    slo: Slo | None
    measured: Measurements
    drift: Drift
    asleep: bool
    partition: Partition | None
    main_memory_gb: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Assumptions of one plan. `keeps_deployment`: a running partition is not questioned."""

    prices: PriceBook
    ratio: float
    rule: RatioRule
    robust: bool
    rules: SystemRules
    keeps_deployment: bool = True
    prompt_tokens: int | None = None
    decode_tokens: float | None = None
    partition: Partition | None = None

    def question(self, **asked: Unpack[_Asked]) -> Question:
        return Question(
            prices=self.prices,
            ratio=self.ratio,
            rule=self.rule,
            robust=self.robust,
            rules=self.rules,
            **asked,
        )


class WhatIfs:
    """The settings' assumptions, and previews of others."""

    def __init__(
        self,
        settings: PlannerSettings,
        model: ModelFacts,
        prices: PriceBook,
        *,
        optimising: bool,
    ) -> None:
        self._model = model
        self._optimising = optimising
        self.usual = WhatIf(
            prices=prices,
            ratio=settings.remote_ratio,
            rule=settings.ratio_rule,
            robust=settings.robust,
            rules=SystemRules(
                platform=settings.platform,
                function_vcpus=settings.function_vcpus,
                granularity=settings.granularity,
                payload_bytes=settings.payload_bytes,
                rows_of_a_pass=settings.rows_per_pass,
                max_replicas=settings.max_replicas,
                main_runtime_gb=settings.main_runtime_gb,
                expert_runtime_gb=settings.expert_runtime_gb,
                expert_expansion=settings.expert_expansion,
            ),
        )

    def asked(self, request: PlanRequest) -> WhatIf:
        return self.usual

    def previewed(self, request: PreviewRequest) -> WhatIf:
        """Check and apply what a preview supposes; raises InvalidRequestError."""
        _check(request, self._model, optimising=self._optimising)
        changes = request.ratio, request.rule, request.partition, request.granularity
        usual = self.usual
        prices = usual.prices
        if request.prices is not None:
            given = msgspec.structs.asdict(request.prices)
            known = {name: value for name, value in given.items() if value is not None}
            prices = msgspec.structs.replace(prices, name="preview", **known)
        rule = request.rule or usual.rule
        if request.ratio is not None and request.rule is None:
            rule = "fixed"
        return replace(
            usual,
            prices=prices,
            ratio=usual.ratio if request.ratio is None else request.ratio,
            rule=rule,
            robust=usual.robust if request.robust is None else request.robust,
            rules=replace(
                usual.rules,
                platform=request.platform or usual.rules.platform,
                granularity=request.granularity or usual.rules.granularity,
            ),
            keeps_deployment=all(change is None for change in changes),
            prompt_tokens=request.prompt_length,
            decode_tokens=request.decode_tokens,
            partition=request.partition,
        )


def _check(request: PreviewRequest, model: ModelFacts, *, optimising: bool) -> None:
    def refuse(param: str, message: str) -> None:
        raise InvalidRequestError(message, param=param)

    if request.ratio is not None and not 0 <= request.ratio <= 1:
        refuse("ratio", f"ratio is {request.ratio}; it must be from 0 to 1.")
    length, written = request.prompt_length, request.decode_tokens
    if length is not None and not 1 <= length <= model.context_length:
        refuse(
            "prompt_length", f"prompt_length is {length}; it must be 1 to {model.context_length}."
        )
    if written is not None and not (math.isfinite(written) and written >= 0):
        refuse("decode_tokens", f"decode_tokens is {written}; it must be 0 or more.")
    for name, price in msgspec.structs.asdict(request.prices).items() if request.prices else ():
        if price is not None and not (math.isfinite(price) and price > 0):
            refuse(f"prices.{name}", f"prices.{name} is {price}; it must be above 0.")
    partition = request.partition
    if partition is not None:
        if request.ratio is not None or request.rule is not None:
            refuse("partition", "Give a partition, or a ratio or rule to make one by, not both.")
        _check_partition(partition, model)
    if not optimising and (request.platform or request.granularity or request.rule):
        refuse(
            "rule",
            "rule, platform and granularity need a hardware profile; `remoe profile hardware` "
            "makes one, and `remoe up` then uses it.",
        )


def _check_partition(partition: Partition, model: ModelFacts) -> None:
    if (partition.layers, partition.experts) != (model.layers, model.experts):
        raise InvalidRequestError(
            f"partition is {partition.layers} layers of {partition.experts} experts; the model "
            f"has {model.layers} of {model.experts}.",
            param="partition",
        )
    dense = np.setdiff1d(np.arange(model.layers), model.moe_layers)
    wrong = [int(layer) for layer in dense if partition.remote[layer]]
    if wrong:
        raise InvalidRequestError(
            f"partition: layer {wrong[0]} has no experts, so none can be remote.",
            param="partition",
        )
