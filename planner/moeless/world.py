"""One setting to replay policies in: traffic, routing, and the machine, with each step made once.

See papers.md B.6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.moeless.policies import Eplb, ExpertParallel, Moeless, MoelessKnobs, Oracle, Policy
from planner.moeless.simulation import Outcome, Setting, simulate
from planner.moeless.token_routes import TokenRoutes
from planner.moeless.traffic import Batch, Step, steps_of
from remoe.moeless.baselines import moved_by_oracle

__all__ = ["World"]


@dataclass
class World:
    """Traffic and routing to replay policies on."""

    tokens: TokenRoutes
    history: NDArray[np.float64]  # [layers, experts]: mean loads that EPLB begins with
    batches: list[Batch]
    setting: Setting
    stride: int

    def __post_init__(self) -> None:
        self._steps: dict[int, list[list[Step]]] = {}

    def run(self, policy: Policy, setting: Setting | None = None) -> Outcome:
        setting = setting or self.setting
        distance = setting.distance
        if distance not in self._steps:
            self._steps[distance] = [
                list(steps_of(batch, self.tokens, distance=distance, stride=self.stride))
                for batch in self.batches
            ]
        steps = {
            batch.start_s: own
            for batch, own in zip(self.batches, self._steps[distance], strict=True)
        }
        return simulate(self.batches, lambda batch: steps[batch.start_s], policy, setting)

    @property
    def knobs(self) -> MoelessKnobs:
        room = self.setting.room
        return MoelessKnobs(
            gpus=self.setting.gpus,
            most_added=self.tokens.experts,
            room=None if room is None else [room] * self.setting.gpus,
        )

    def moeless(self, **changes: object) -> Moeless:
        return Moeless(self.history, replace(self.knobs, **changes))  # type: ignore[arg-type]

    def baselines(self) -> list[Policy]:
        size = {
            "layers": self.tokens.layers,
            "experts": self.tokens.experts,
            "gpus": self.setting.gpus,
        }
        eplb = Eplb(self.history, gpus=self.setting.gpus, redundant=self.tokens.experts)
        return [ExpertParallel(**size), eplb, Oracle(**size)]

    def skew(self) -> tuple[float, float]:
        """The most loaded expert's share over an even one, and what an Oracle moves: prefills."""
        prefills = [own[0].loads for own in next(iter(self._steps.values()))]
        loads = np.concatenate(prefills)
        return (
            float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
            float(np.mean([moved_by_oracle(row) for row in loads])),
        )
