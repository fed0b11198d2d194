"""What requests have really taken here: moving averages that forecasts are made of.

Nothing is assumed about the machine: each number is None until a request has shown it.

See papers.md A.3, A.4.
"""

from __future__ import annotations

import msgspec

from planner.moving_mean import MovingMean
from planner.prefill_time import PrefillTime
from remoe.ledger import Ledger

__all__ = ["FinishedRequest", "Learner", "Measurements"]


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """Moving averages over finished requests.

    A prompt's first token takes `prefill_fixed_s` and `prefill_s_per_token`.
    `main_cpu_share` and `main_gpu_share` are the GB·s billed per planned GB and second in the main
    function: below 1 when requests share engine steps, and one of them 0 where all is on the other.
    `remote_s_per_call` is computing time of expert functions, as billed. `decode_tokens` is the
    mean number of tokens after the first (the paper's N^out).
    """

    prefill_fixed_s: float | None = None
    prefill_s_per_token: float | None = None
    decode_s_per_token: float | None = None
    remote_s_per_call: float | None = None
    main_cpu_share: float | None = None
    main_gpu_share: float | None = None
    decode_tokens: float | None = None
    requests: int = 0

    def prefill_s(self, prompt_tokens: int) -> float | None:
        """Time to the first token of a prompt; None before a request has shown one."""
        if self.prefill_fixed_s is None or self.prefill_s_per_token is None:
            return None
        return self.prefill_fixed_s + self.prefill_s_per_token * prompt_tokens


class FinishedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as far as it teaches. `ttft_s` is without cold starts, `cold` if there was one;
    `main_memory_gb` is what its plan said, `remote_memory_gb` the mean memory of the expert
    functions."""

    prompt_tokens: int
    decode_tokens: float
    ttft_s: float
    tpot_s: float | None
    main_memory_gb: float | None
    remote_memory_gb: float
    ledger: Ledger | None
    cold: bool = False


class Learner:
    """Keeps the measurements; `adaptation` is the least weight of the newest request."""

    def __init__(self, adaptation: float) -> None:
        self._adaptation = adaptation
        self._prefill, self._warm = PrefillTime(adaptation), False
        self._decode_s, self._call_s = MovingMean(adaptation), MovingMean(adaptation)
        self._cpu_share, self._gpu_share = MovingMean(adaptation), MovingMean(adaptation)
        self.measured = Measurements()

    def observe(self, request: FinishedRequest) -> None:
        before = self.measured
        requests = before.requests + 1
        cpu, gpu = _main_shares(request)
        mean = before.decode_tokens or 0.0
        self._learn_prefill(request)
        self._decode_s.add(request.tpot_s)
        self._call_s.add(_call_s(request))
        self._cpu_share.add(cpu)
        self._gpu_share.add(gpu)
        fixed_s, s_per_token = self._prefill.line or (None, None)
        self.measured = Measurements(
            prefill_fixed_s=fixed_s,
            prefill_s_per_token=s_per_token,
            decode_s_per_token=self._decode_s.value,
            remote_s_per_call=self._call_s.value,
            main_cpu_share=self._cpu_share.value,
            main_gpu_share=self._gpu_share.value,
            decode_tokens=mean + (request.decode_tokens - mean) / requests,
            requests=requests,
        )

    def _learn_prefill(self, request: FinishedRequest) -> None:
        """What remains of a cold request's TTFT is its functions' first work, not the model's: it
        counts only as long as there is nothing better."""
        if request.ttft_s == 0 or (request.cold and self._warm):
            return
        if not request.cold and not self._warm:
            self._prefill, self._warm = PrefillTime(self._adaptation), True
        self._prefill.add(request.prompt_tokens, request.ttft_s)


def _call_s(request: FinishedRequest) -> float | None:
    ledger = request.ledger
    if ledger is None or ledger.remote_calls == 0 or request.remote_memory_gb == 0:
        return None
    return ledger.remote_gb_s / ledger.remote_calls / request.remote_memory_gb


def _main_shares(request: FinishedRequest) -> tuple[float | None, float | None]:
    seconds = request.ttft_s + (request.tpot_s or 0.0) * request.decode_tokens
    if request.ledger is None or not request.main_memory_gb or seconds == 0:
        return None, None
    planned_gb_s = request.main_memory_gb * seconds
    return (
        request.ledger.main_cpu_gb_s / planned_gb_s,
        request.ledger.main_gpu_gb_s / planned_gb_s,
    )
