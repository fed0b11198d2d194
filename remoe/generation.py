"""What the gateway asks of the main-model function, and the events it streams back.

`POST /v1/generate` with a JSON `GenerateRequest`; the reply is one JSON `GenerateEvent` a line
(`application/x-ndjson`). The last event has `finish` set and carries the stats. Closing the
connection cancels the request.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from remoe.balance_report import BalanceReport
from remoe.ledger import Ledger
from remoe.moeless.function_balance import Policy

__all__ = [
    "MAX_LOGPROBS",
    "REPORT_PERIOD_S",
    "FinishReason",
    "GenerateEvent",
    "GenerateRequest",
    "GenerationStats",
    "SamplingParams",
    "TokenLogprob",
    "TopLogprob",
]

FinishReason = Literal["stop", "length", "error"]

REPORT_PERIOD_S = 1.0
"""The longest silence of a main function that is alive, from a request's admission on."""

MAX_LOGPROBS = 20
"""Most alternatives a token's log-probabilities may list."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 and `min_p` 0 are off.

    All penalties look at the generated tokens only: presence and frequency are OpenAI's, the
    repetition penalty is transformers' with the prompt ignored, and off at 1. Penalizing a short
    question's own words would make a small model avoid its subject.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`max_new_tokens` counts the first token too; `stop_tokens` end the text and are not sent.

    `plan_id` is None if there is no plan, or not yet.

    With `running_stats` every event carries the stats so far: the caller looks for stop strings
    in the text, may leave at any event, and still wants to know what it used.

    `logprobs` asks for each generated token's log-probability and that many alternatives (0 to
    20), `prompt_logprobs` for the same of the prompt's tokens; None is neither. With
    `prompt_logprobs`, `max_new_tokens` may be 0: the prompt is scored and nothing generated.
    `deadline_s` is how long the caller still waits; what is not done by then ends as an error, and
    no remote call outlives it.

    `profile` is the planner's prediction of the request's routes, [layers][experts]: the joint
    policy seeds its loads with it. `policy` is the one that the planner would serve it by, of which
    joint mode takes notice; None leaves it to loads.

    `grammar` is an llguidance grammar (Lark, or its JSON form): only tokens that keep the answer
    within it are drawn, and `stop_tokens` only where it may end.
    """

    request_id: str
    plan_id: str | None
    prompt_tokens: list[int]
    max_new_tokens: int
    stop_tokens: list[int]
    sampling: SamplingParams = SamplingParams()
    running_stats: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline_s: float | None = None
    grammar: str | None = None
    profile: list[list[float]] | None = None
    policy: Policy | None = None


class GenerationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds inside the main function, from the request's arrival there.

    Route counts are [layers][experts], of the rows that were computed for this request: pages of
    its prompt that another request had filled are neither counted nor in the ledger. If nothing
    was to be generated, the first token's time is when the prompt was read.
    """

    queue_s: float
    first_token_s: float
    total_s: float
    prompt_tokens: int
    output_tokens: int
    deployment_plan_id: str
    ledger: Ledger
    prefill_counts: list[list[int]]
    decode_counts: list[list[int]]
    balance: BalanceReport | None = None


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token that could have come, and its natural log-probability."""

    token: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token that came, and the most likely ones at its place, the likeliest first.

    Log-probabilities are of the model's own distribution: before temperature, filters, biases and
    penalties, as OpenAI's are.
    """

    token: int
    logprob: float
    top: list[TopLogprob]


class GenerateEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens, and at the end why there are no more. `error` only with finish "error".

    `logprobs`, if asked for, has one entry for each of `tokens`. `prompt_logprobs` comes once,
    with the first event or before it: one entry for each token of the prompt, the first None.

    `ledger` is what the request has used so far; on an event without stats, which have the whole.
    An event with nothing else comes every `REPORT_PERIOD_S` while there is nothing to tell: the
    caller knows what to bill if it leaves, and a silent connection to be a dead one.
    """

    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] = []
    finish: FinishReason | None = None
    stats: GenerationStats | None = None
    ledger: Ledger | None = None
    error: str | None = None
