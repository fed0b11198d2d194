"""What finished requests teach the planner: times, the demand, how right it was, and the history.

See papers.md A.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from planner.accuracy import Accuracy
from planner.calibration import Calibration, Drift
from planner.config import PlannerSettings
from planner.embedding import Embedder
from planner.epoch import DemandWindow
from planner.history import History
from planner.identifiers import Clock
from planner.measurements import FinishedRequest, Learner, Measurements
from planner.model import ModelFacts
from planner.phases import PhaseProfiles
from planner.route_totals import RouteTotals
from planner.validation import check_observation
from remoe.activation_totals import ActivationTotals
from remoe.experts import ActivationProfile
from remoe.plan import Deployment, Observation
from remoe.topology import ExpertEndpoint

__all__ = ["HistoryStats", "Lessons", "Noted"]


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
    drift: Drift


class Lessons:
    """Keeps what requests showed. Plans say what they expect, observations what came of it."""

    def __init__(
        self,
        settings: PlannerSettings,
        *,
        model: ModelFacts,
        functions: Sequence[ExpertEndpoint],
        embedder: Embedder,
        history: History,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._model = model
        self._functions = functions
        self._embedder = embedder
        self._clock = clock
        self.history = history
        self.calibration = Calibration(settings.adaptation)
        self.window = DemandWindow(settings.epoch_window_s)
        self.learner = Learner(settings.adaptation)
        self._accuracy = Accuracy()
        self._routes = RouteTotals(model.layers, model.experts)

    def expect(self, plan_id: str, profiles: PhaseProfiles) -> None:
        """A plan was made that a request will follow."""
        self._accuracy.predicted(plan_id, profiles)

    def take(self, observation: Observation, deployed: Deployment | None) -> Noted:
        """Learn from a finished request; what is returned is durable.

        Raises InvalidRequestError, or HistoryUnwritableError if only its times could be learned.
        """
        prefill, decode = check_observation(observation, self._model)
        steps = float(decode.sum(axis=1).max()) / self._model.top_k
        warm_ttft_s = max(0.0, observation.ttft_s - observation.cold_start_s)
        cold = observation.cold_start_s > 0
        usual_ttft_s = None if cold else observation.ttft_s
        self.calibration.observed(observation.plan_id, usual_ttft_s, observation.tpot_s)
        memories = [function.memory_gb for function in self._functions]
        self.learner.observe(
            FinishedRequest(
                prompt_tokens=len(observation.prompt_tokens),
                decode_tokens=steps,
                ttft_s=warm_ttft_s,
                tpot_s=observation.tpot_s,
                main_memory_gb=None if deployed is None else deployed.main_memory_gb,
                remote_memory_gb=sum(memories) / len(memories) if memories else 0.0,
                ledger=observation.ledger,
                cold=cold,
            )
        )
        if not prefill.any():
            return Noted(
                history_id=None, known_prompt=False, prefill_js_nats=None, decode_js_nats=None
            )
        profile = ActivationProfile.from_counts(prefill)
        decode_profile = ActivationProfile.from_counts(decode) if decode.any() else None
        predicted = self._accuracy.prediction(observation.plan_id)
        if predicted is not None:
            self._routes.add(predicted, prefill, decode)
        of_prefill, of_decode = self._accuracy.observed(
            observation.plan_id, profile, decode_profile
        )
        tokens = observation.prompt_tokens
        self.window.add(self._clock.monotonic(), profile, decode_profile, len(tokens), steps)
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

    def activations(self) -> ActivationTotals:
        """Predicted and actual routes of all requests that had a plan and were observed."""
        return self._routes.read()

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
            measured=self.learner.measured,
            drift=self.calibration.drift,
        )
