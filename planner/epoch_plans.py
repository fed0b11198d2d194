"""Plans for the demand of a sliding window: what a main function loads that no request woke, and
whether a running one should change (with hysteresis).

Ours, beyond papers.md A.15.
"""

from __future__ import annotations

import numpy as np

from planner.deployments import EPOCH
from planner.epoch import EpochReview, decide, newly_local
from planner.forecast import Workload, decode_tokens
from planner.identifiers import Clock, PlanIds
from planner.lessons import Lessons
from planner.model import ModelFacts
from planner.plan_making import Decisions, PlanMaker, Question
from planner.what_if import WhatIfs
from remoe.experts import Partition
from remoe.hardware import HardwareProfile
from remoe.plan import Deployment

__all__ = ["EpochPlans"]


class EpochPlans:
    """Makes and reviews them. `most_main_gb` is the memory a main function may hold."""

    def __init__(
        self,
        *,
        model: ModelFacts,
        maker: PlanMaker,
        what_ifs: WhatIfs,
        lessons: Lessons,
        hardware: HardwareProfile | None,
        most_main_gb: float,
        ids: PlanIds,
        clock: Clock,
    ) -> None:
        self._model = model
        self._maker = maker
        self._what_ifs = what_ifs
        self._lessons = lessons
        self._hardware = hardware
        self._most_main_gb = most_main_gb
        self._ids = ids
        self._clock = clock

    def make(self) -> Deployment:
        """Plan for the whole demand: any prompt, up to the context's length."""
        self._lessons.calibration.renew()
        question = self._question()
        return self._deployment(question, self._maker.decide(question))

    def review(self, running: Deployment | None) -> EpochReview:
        """Say whether the running partition should change, and to what."""
        if running is None:
            return EpochReview(change=False, why="The main function is not running.")
        recent = self._lessons.window.demand(self._clock.monotonic())
        if recent is None:
            return EpochReview(change=False, why="No request has finished within the window.")
        current = self._maker.decide(self._question(running.partition))
        question = self._question()
        candidate = self._maker.decide(question)
        if candidate.partition == running.partition:
            return EpochReview(change=False, why="The best partition is the running one.")
        if self._hardware is None or current.cost_usd is None or candidate.cost_usd is None:
            return EpochReview(
                change=False,
                why="Without a hardware profile nothing says what a change saves and costs; "
                "`remoe profile hardware` makes one.",
            )
        if candidate.main_memory_gb > self._most_main_gb:
            return EpochReview(
                change=False,
                why=f"The best partition needs {candidate.main_memory_gb:.2f} GB in the main "
                f"function, which may hold {self._most_main_gb:.2f} GB.",
            )
        read = newly_local(running.partition, candidate.partition)
        read_s = read * self._model.expert_size_bytes / self._hardware.read_bytes_per_s
        return decide(
            current_usd=current.cost_usd,
            candidate_usd=candidate.cost_usd,
            requests=recent[2],
            change_usd=read_s * (candidate.main_usd_per_s or 0.0),
            candidate=self._deployment(question, candidate),
        )

    def _deployment(self, question: Question, made: Decisions) -> Deployment:
        read, write = question.workload.prompt_tokens, question.workload.decode_tokens
        shares = question.profiles.mixed(read, write).shares.astype(np.float64)
        return Deployment(
            plan_id=self._ids.make("epoch"),
            model_digest=self._model.digest,
            partition=made.partition,
            main_memory_gb=made.main_memory_gb,
            origin=EPOCH,
            profile=np.round(shares, 6).tolist(),
        )

    def _question(self, partition: Partition | None = None) -> Question:
        """The window's mean request or, without one, the history's."""
        measured = self._lessons.learner.measured
        recent = self._lessons.window.demand(self._clock.monotonic())
        if recent is None:
            profiles = self._lessons.history.mean_profiles()
            read = max(1, round(self._lessons.history.mean_prompt_tokens))
            workload = Workload(read, decode_tokens(None, measured))
        else:
            profiles, workload, _ = recent
        return self._what_ifs.usual.question(
            profiles=profiles,
            workload=workload,
            longest_tokens=self._model.context_length,
            slo=None,
            measured=measured,
            drift=self._lessons.calibration.drift,
            asleep=False,
            partition=partition,
            main_memory_gb=None,
        )
