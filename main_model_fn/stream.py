"""One admitted request at work: filled in the engine's thread, read on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from typing import NamedTuple, Self

from main_model_fn.guide import Guide
from main_model_fn.metering import RequestMeter
from remoe.generation import FinishReason, GenerateRequest, TokenLogprob

__all__ = ["Progress", "Stream"]


class Progress(NamedTuple):
    """News of a stream: how many tokens it has now, and at the end why there are no more."""

    tokens: int
    finish: FinishReason | None = None


class Stream:
    """A request with everything that an engine needs and fills while it works on it.

    `tokens` are those generated, a stop token included; `logprobs` has an entry for each if the
    request asks for them, and `prompt_logprobs` for each token of the prompt once it is read.
    Made on the event loop that reads it; `add` and `fail` are called from the engine's thread.
    """

    def __init__(
        self, request: GenerateRequest, meter: RequestMeter, guide: Guide | None = None
    ) -> None:
        self.request = request
        self.meter = meter
        self.guide = guide
        # Clients choose request ids and may repeat them; the engine's own must be unique.
        self.engine_id = f"{request.request_id}-{secrets.token_hex(4)}"
        seed = request.sampling.seed
        self.seed = secrets.randbits(62) if seed is None else seed
        self.max_new_tokens = max(1, request.max_new_tokens)  # a prompt is scored on the way to one
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        scored = 0 if request.prompt_logprobs is None else len(request.prompt_tokens)
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * scored
        self.computed = 0
        """Positions that have passed the model: after them, none is computed for the first time."""
        self.ended = False
        """Nothing more is to be computed: the stream is finished, or nobody reads it any more."""
        self._stop_tokens = frozenset(request.stop_tokens)
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Progress] = asyncio.Queue()

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Note the next token, and whether it is the last."""
        if self.ended:
            return
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self._stop_tokens:
            self._tell("stop")
        else:
            self._tell("length" if len(self.tokens) >= self.max_new_tokens else None)

    def fail(self) -> None:
        """End with an error."""
        if not self.ended:
            self._tell("error")

    def _tell(self, finish: FinishReason | None) -> None:
        self.ended = finish is not None
        # A loop that is gone has nobody who reads.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(
                self._news.put_nowait, Progress(len(self.tokens), finish)
            )

    async def news(self, within_s: float) -> Progress | None:
        """The next news, None if there is none in time. Raises TimeoutError at the deadline."""
        deadline_at = self.meter.deadline_at
        left_s = math.inf if deadline_at is None else deadline_at - time.monotonic()
        try:
            async with asyncio.timeout(min(left_s, within_s)):
                return await self._news.get()
        except TimeoutError:
            if left_s <= within_s:
                raise
            return None

    def __deepcopy__(self, memo: object) -> Self:
        """The same stream: a batching engine copies a request's arguments when it re-queues it."""
        return self
