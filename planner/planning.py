"""The planner itself: everything the service answers, without the service.

Not thread-safe, and quick: one thread calls it, whoever that is.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import structlog

from planner.accuracy import Accuracy
from planner.config import PlannerSettings
from planner.deployments import EPOCH, Deployments
from planner.embedding import Embedder
from planner.forecast import Workload, decode_tokens, forecast, function_loads
from planner.history import History
from planner.identifiers import Clock, PlanIds
from planner.measurements import FinishedRequest, Learner, Measurements
from planner.memory import MemoryRule
from planner.model import ModelFacts
from planner.prediction import ActivationPredictor, Prompt
from planner.predictors import open_embedder, open_history, open_predictor
from planner.regression import RegressionPredictor
from planner.selection import select_remote
from planner.validation import check_observation, check_plan_request
from remoe.checkpoint import Checkpoint
from remoe.experts import ActivationProfile
from remoe.plan import Deployment, FunctionForecast, Observation, Plan, PlanRequest
from remoe.topology import Topology

__all__ = ["HistoryStats", "Noted", "Planner"]

_log = structlog.get_logger()


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an observation. `history_id` is null if it had no activations to keep."""

    history_id: int | None
    known_prompt: bool
    prefill_js_nats: float | None
    decode_js_nats: float | None


class HistoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """`sets` counts entries by prompt set; `folded` counts prompts that were merged into their most
    similar one, the history being full. `durable` says whether observations outlive the process, and
    `problem` why none can be taken. `prefill_js_nats` and `decode_js_nats` are the mean
    divergences of predictions from what happened, of so many `*_compared`; `measured` is what
    forecasts rest on."""

    model: str
    model_digest: str
    entries: int
    shipped: int
    capacity: int
    durable: bool
    problem: str | None
    embedder: str
    predictor: str
    known_prompts_seen_again: int
    folded: int
    topics: int
    sets: dict[str, int]
    prefill_compared: int
    prefill_js_nats: float | None
    decode_compared: int
    decode_js_nats: float | None
    measured: Measurements


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
        self._memory = MemoryRule(
            model=model,
            main_runtime_gb=settings.main_runtime_gb,
            expert_runtime_gb=settings.expert_runtime_gb,
            expert_expansion=settings.expert_expansion,
        )
        self._learner = Learner(settings.adaptation)
        self._accuracy = Accuracy()
        self._deployments = Deployments(window_s=settings.claim_window_s, clock=clock)
        self._ids = PlanIds(clock)
        if settings.remote_ratio > 0:
            for layer in model.moe_layers:
                topology.expert_for(layer)

    @classmethod
    def load(cls, settings: PlannerSettings, *, clock: Clock = time) -> Planner:
        """Open the checkpoint and the history; raises SettingsError or CheckpointError."""
        topology = settings.load_topology()
        checkpoint = Checkpoint.open(Path(topology.model_dir))
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
        prediction = self._predictor.predict(
            Prompt(request.prompt_tokens, self._embedder.embed(request.prompt_tokens))
        )
        measured = self._learner.measured
        workload = Workload(
            len(request.prompt_tokens), decode_tokens(request.max_new_tokens, measured)
        )
        profile = prediction.profiles.mixed(workload.prompt_tokens, workload.decode_tokens)
        deployed = self._deployments.current
        if deployed is None:
            partition = select_remote(profile, self._settings.remote_ratio)
            tokens = len(request.prompt_tokens) + request.max_new_tokens
            main_gb = self._memory.main_gb(partition, min(tokens, self._model.context_length))
        else:
            partition, main_gb = deployed.partition, deployed.main_memory_gb
        loads = function_loads(
            prediction.profiles, partition, self._functions, workload, self._model.top_k
        )
        expected = forecast(
            workload,
            loads,
            main_memory_gb=main_gb,
            measured=measured,
            prices=self._prices,
            slo=request.slo,
        )
        plan = Plan(
            plan_id=self._ids.make("plan"),
            model=self._model.name,
            model_digest=self._model.digest,
            partition=partition,
            profile=np.round(profile.shares.astype(np.float64), 6).tolist(),
            main_memory_gb=main_gb,
            functions=[
                FunctionForecast(
                    name=load.function.name,
                    expected_routes=load.routes,
                    memory_gb=self._memory.expert_gb(partition, load.function),
                    replicas=1,
                )
                for load in loads
                if self._memory.remote_experts(partition, load.function)
            ],
            prewarm=[
                load.function.name for load in loads if load.routes >= self._settings.prewarm_routes
            ],
            neighbours=list(prediction.neighbours),
            predicted_ttft_s=expected.ttft_s,
            predicted_tpot_s=expected.tpot_s,
            predicted_cost_usd=expected.cost_usd,
            feasible=expected.feasible,
        )
        self._deployments.planned(plan)
        self._accuracy.predicted(plan.plan_id, prediction.profiles)
        return plan

    def claim(self) -> Deployment:
        """Give a starting main function what it is to load."""
        deployment = self._deployments.claim(self._epoch)
        _log.info(
            "deployment_claimed",
            plan_id=deployment.plan_id,
            origin=deployment.origin,
            remote_experts=deployment.partition.remote_count,
            main_memory_gb=round(deployment.main_memory_gb, 3),
        )
        return deployment

    def _epoch(self) -> Deployment:
        """Plan for the whole demand: any prompt, up to the context's length."""
        profile = self.history.mean_profiles().mixed(
            self.history.mean_prompt_tokens, decode_tokens(None, self._learner.measured)
        )
        partition = select_remote(profile, self._settings.remote_ratio)
        return Deployment(
            plan_id=self._ids.make("epoch"),
            model_digest=self._model.digest,
            partition=partition,
            main_memory_gb=self._memory.main_gb(partition, self._model.context_length),
            origin=EPOCH,
        )

    def release(self, plan_id: str | None = None) -> None:
        """Note that the main function stops; naming the deployment spares a successor's."""
        if self._deployments.release(plan_id):
            _log.info("deployment_released", plan_id=plan_id)

    def observe(self, observation: Observation) -> Noted:
        """Learn from a finished request; what is returned is durable.

        Raises InvalidRequestError, or HistoryUnwritableError if only its times could be learned.
        """
        prefill, decode = check_observation(observation, self._model)
        steps = float(decode.sum(axis=1).max()) / self._model.top_k
        deployed = self._deployments.current
        memories = [function.memory_gb for function in self._functions]
        self._learner.observe(
            FinishedRequest(
                prompt_tokens=len(observation.prompt_tokens),
                decode_tokens=steps,
                ttft_s=max(0.0, observation.ttft_s - observation.cold_start_s),
                tpot_s=observation.tpot_s,
                main_memory_gb=None if deployed is None else deployed.main_memory_gb,
                remote_memory_gb=sum(memories) / len(memories) if memories else 0.0,
                ledger=observation.ledger,
            )
        )
        if not prefill.any():
            return Noted(
                history_id=None, known_prompt=False, prefill_js_nats=None, decode_js_nats=None
            )
        profile = ActivationProfile.from_counts(prefill)
        decode_profile = ActivationProfile.from_counts(decode) if decode.any() else None
        of_prefill, of_decode = self._accuracy.observed(
            observation.plan_id, profile, decode_profile
        )
        tokens = observation.prompt_tokens
        history_id, known = self.history.add(
            self._embedder.embed(tokens),
            profile,
            decode_profile,
            len(tokens),
            decode_tokens=steps,
            at_s=self._clock.time(),
        )
        return Noted(
            history_id=history_id,
            known_prompt=known,
            prefill_js_nats=of_prefill,
            decode_js_nats=of_decode,
        )

    def stats(self) -> HistoryStats:
        return HistoryStats(
            model=self._model.name,
            model_digest=self._model.digest,
            entries=len(self.history),
            shipped=self.history.shipped,
            capacity=self.history.capacity,
            durable=self.history.store.durable,
            problem=self.history.store.problem,
            embedder=self._embedder.name,
            predictor=self._settings.predictor,
            known_prompts_seen_again=self.history.seen_again,
            folded=self.history.folded,
            topics=self.history.topic_count(),
            sets=self.history.set_counts(),
            prefill_compared=self._accuracy.prefill.count,
            prefill_js_nats=self._accuracy.prefill.value,
            decode_compared=self._accuracy.decode.count,
            decode_js_nats=self._accuracy.decode.value,
            measured=self._learner.measured,
        )
