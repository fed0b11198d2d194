"""The planner itself: everything the service answers, without the service.

Not thread-safe, and quick: one thread calls it, whoever that is.

See papers.md A.6.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import structlog

from planner.config import PlannerSettings
from planner.deployments import Deployments
from planner.embedding import Embedder
from planner.epoch import EpochReview
from planner.epoch_plans import EpochPlans
from planner.explaining import PlanRecord, diff, explain
from planner.forecast import Workload, decode_tokens
from planner.history import History
from planner.identifiers import Clock, PlanIds
from planner.lessons import HistoryStats, Lessons, Noted
from planner.memory import MemoryRule
from planner.model import ModelFacts
from planner.plan_making import FixedRatio, Optimising, PlanMaker
from planner.policy_forecasts import PolicyForecaster, choose_policy
from planner.prediction import ActivationPredictor, Prompt
from planner.predictors import open_embedder, open_history, open_predictor
from planner.recent_plans import RecentPlans
from planner.regression import RegressionPredictor
from planner.validation import check_plan_request
from planner.what_if import WhatIf, WhatIfs
from remoe.activation_totals import ActivationTotals
from remoe.checkpoint import Checkpoint
from remoe.hardware import HardwareProfile
from remoe.moeless.function_balance import FunctionShare
from remoe.plan import Deployment, Observation, Plan, PlanRequest, PolicyForecast
from remoe.planning_messages import Explanation, PlanDiff, PlanDiffRequest, PreviewRequest
from remoe.topology import Topology

__all__ = ["Planner"]

_log = structlog.get_logger()


class Planner:
    """Plans requests, hands deployments to main functions, and learns from what happened."""

    def __init__(
        self,
        *,
        settings: PlannerSettings,
        topology: Topology,
        model: ModelFacts,
        embedder: Embedder,
        history: History,
        predictor: ActivationPredictor,
        hardware: HardwareProfile | None = None,
        clock: Clock = time,
    ) -> None:
        self._settings = settings
        self._prices = settings.load_prices()
        self._functions = topology.experts
        self._model = model
        self._embedder = embedder
        self.history = history
        self._predictor = predictor
        self._clock = clock
        memory = MemoryRule(
            model=model,
            main_runtime_gb=settings.main_runtime_gb,
            expert_runtime_gb=settings.expert_runtime_gb,
            expert_expansion=settings.expert_expansion,
        )
        self._hardware = hardware
        self._maker: PlanMaker = FixedRatio(model, self._functions, memory)
        self._policies: PolicyForecaster | None = None
        if hardware is not None:
            self._maker = optimising = Optimising(
                model,
                self._functions,
                memory,
                hardware,
                gpu_speedup=settings.gpu_speedup,
                by_milp=settings.solver == "milp",
            )
            self._policies = PolicyForecaster(
                maker=optimising,
                functions=[FunctionShare.of(one) for one in self._functions],
                top_k=model.top_k,
                expert_gb=model.expert_size_bytes / 1e9,
                most_main_gb=topology.main_memory_gb,
                most_replicas=settings.function_replicas,
            )
        self._what_ifs = WhatIfs(settings, model, self._prices, optimising=hardware is not None)
        self._lessons = Lessons(
            settings,
            model=model,
            functions=self._functions,
            embedder=embedder,
            history=history,
            clock=clock,
        )
        self._records = RecentPlans()
        self._deployments = Deployments(window_s=settings.claim_window_s, clock=clock)
        self._ids = PlanIds(clock)
        self._epochs = EpochPlans(
            model=model,
            maker=self._maker,
            what_ifs=self._what_ifs,
            lessons=self._lessons,
            hardware=hardware,
            most_main_gb=topology.main_memory_gb,
            ids=self._ids,
            clock=clock,
        )
        if settings.remote_ratio > 0:
            for layer in model.moe_layers:
                topology.expert_for(layer)

    @classmethod
    def load(cls, settings: PlannerSettings, *, clock: Clock = time) -> Planner:
        """Open the checkpoint and the history; raises SettingsError or CheckpointError."""
        topology = settings.load_topology()
        checkpoint = Checkpoint.open(Path(topology.model_dir))
        topology.check_weights(checkpoint.digest)
        model = ModelFacts.of(checkpoint, topology.model)
        embedder = open_embedder(settings.embedder, checkpoint)
        history = open_history(settings, model, embedder)
        return cls(
            settings=settings,
            topology=topology,
            model=model,
            embedder=embedder,
            history=history,
            predictor=open_predictor(settings, history, model),
            hardware=settings.load_hardware(model.digest),
            clock=clock,
        )

    @property
    def to_fit(self) -> RegressionPredictor | None:
        """The predictor, if it should be fitted anew: by whoever has the time."""
        predictor = self._predictor
        if isinstance(predictor, RegressionPredictor) and predictor.fit_is_due():
            return predictor
        return None

    @property
    def deployment(self) -> Deployment | None:
        """What the main function runs, as far as it has said."""
        return self._deployments.current

    def plan(self, request: PlanRequest) -> Plan:
        """Plan one request; raises InvalidRequestError, ContextLengthError, ModelNotFoundError.

        The plan's `profile` is the whole request's: both phases, by their expected tokens.
        """
        check_plan_request(request, self._model)
        record = self._planned(request, self._what_ifs.asked(request), "plan")
        self._deployments.planned(record.plan)
        self._lessons.expect(record.plan.plan_id, record.question.profiles)
        self._records.add(record)
        return record.plan

    def preview(self, request: PreviewRequest) -> Plan:
        """Plan without consequences, under other assumptions; raises InvalidRequestError."""
        asked = PlanRequest(
            model=request.model,
            prompt_tokens=request.prompt_tokens,
            max_new_tokens=request.max_new_tokens,
            slo=request.slo,
            streams=request.streams,
        )
        check_plan_request(asked, self._model)
        record = self._planned(asked, self._what_ifs.previewed(request), "preview")
        self._records.add(record)
        return record.plan

    def _planned(self, request: PlanRequest, what_if: WhatIf, kind: str) -> PlanRecord:
        prediction = self._predictor.predict(
            Prompt(request.prompt_tokens, self._embedder.embed(request.prompt_tokens))
        )
        measured = self._lessons.learner.measured
        read = what_if.prompt_tokens or len(request.prompt_tokens)
        written = what_if.decode_tokens
        if written is None:
            written = decode_tokens(request.max_new_tokens, measured)
        deployed = self._deployments.current if what_if.keeps_deployment else None
        question = what_if.question(
            profiles=prediction.profiles,
            workload=Workload(read, written),
            longest_tokens=read + request.max_new_tokens,
            slo=request.slo,
            measured=measured,
            drift=self._lessons.calibration.drift,
            asleep=self._deployments.current is None,
            partition=what_if.partition or (deployed.partition if deployed else None),
            main_memory_gb=deployed.main_memory_gb if deployed else None,
        )
        made = self._maker.decide(question)
        profile = prediction.profiles.mixed(read, written)
        policies: list[PolicyForecast] = []
        if request.streams is not None and self._policies is not None:
            policies = self._policies.forecast(question, made, request.streams)
        plan = Plan(
            plan_id=self._ids.make(kind),
            model=self._model.name,
            model_digest=self._model.digest,
            partition=made.partition,
            profile=np.round(profile.shares.astype(np.float64), 6).tolist(),
            main_memory_gb=made.main_memory_gb,
            functions=made.functions,
            prewarm=[
                load.function.name
                for load in made.loads
                if load.routes >= self._settings.prewarm_routes
            ],
            neighbours=list(prediction.neighbours),
            predicted_ttft_s=made.ttft_s,
            predicted_tpot_s=made.tpot_s,
            predicted_cost_usd=made.cost_usd,
            feasible=made.status != "infeasible",
            status=made.status,
            needed=made.needed,
            cost_split=made.cost_split,
            slo_ttft_s=made.slo_ttft_s,
            slo_tpot_s=made.slo_tpot_s,
            policies=policies,
            policy=choose_policy(policies, request.slo),
        )
        if kind == "plan" and made.bare_ttft_s is not None:
            self._lessons.calibration.predicted(plan.plan_id, made.bare_ttft_s, made.bare_tpot_s)
        return PlanRecord(plan, question)

    def explain(self, plan_id: str) -> Explanation:
        """Say why a plan made lately is as it is; raises NotFoundError."""
        record = self._records.get(plan_id)
        others = self._maker.baselines(record.question)
        return explain(record, self._model, self._functions, others)

    def diff(self, request: PlanDiffRequest) -> PlanDiff:
        """Compare two plans made lately; raises NotFoundError."""
        return diff(self._records.get(request.before).plan, self._records.get(request.after).plan)

    def claim(self) -> Deployment:
        """Give a starting main function what it is to load."""
        deployment = self._deployments.claim(self._epochs.make)
        _log.info(
            "deployment_claimed",
            plan_id=deployment.plan_id,
            origin=deployment.origin,
            remote_experts=deployment.partition.remote_count,
            main_memory_gb=round(deployment.main_memory_gb, 3),
        )
        return deployment

    def review(self) -> EpochReview:
        """Say whether the running partition should change, and to what (hysteresis)."""
        return self._epochs.review(self._deployments.current)

    def adapted(self, deployment: Deployment, instead_of: str) -> None:
        """Note that the running main function has changed to `deployment`."""
        self._deployments.replace(deployment, instead_of)

    def release(self, plan_id: str | None = None) -> None:
        """Note that the main function stops; naming the deployment spares a successor's."""
        if self._deployments.release(plan_id):
            _log.info("deployment_released", plan_id=plan_id)

    def observe(self, observation: Observation) -> Noted:
        """Learn from a finished request; what is returned is durable.

        Raises InvalidRequestError, or HistoryUnwritableError if only its times could be learned.
        """
        return self._lessons.take(observation, self._deployments.current)

    def activations(self) -> ActivationTotals:
        """Predicted and actual routes of all requests that had a plan and were observed."""
        return self._lessons.activations()

    def stats(self) -> HistoryStats:
        return self._lessons.stats()
