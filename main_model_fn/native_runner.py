"""Many streams at once through a model that is all native: a step loop over a paged cache.

What transformers' continuous batching does for other models (paged_runner.py), as far as one
process and one kind of attention need it. Importing that takes longer than all else of a start.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import Paged
from main_model_fn.native_model import NativeModel
from main_model_fn.pages import Pages, page_names
from main_model_fn.prompt_scoring import PromptScorer
from main_model_fn.runner import EngineLimits
from main_model_fn.runner_thread import RunnerThread
from main_model_fn.steps import Part, Steps
from main_model_fn.stream import Stream

__all__ = ["NativeRunner"]


class _Run:
    """A stream with its tokens, prompt and generated, of which `computed` are in the cache."""

    def __init__(self, stream: Stream) -> None:
        prompt = stream.request.prompt_tokens
        self.stream = stream
        self.tokens = list(prompt)
        self.computed = 0
        self.pages: list[int] = []
        self.names: list[bytes] = []  # of the complete pages among `pages` whose tokens are known
        self.places = np.empty(0, np.int64)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be told."""
        return len(self.tokens) - self.computed

    def hold(self, pages: list[int], page_tokens: int) -> None:
        self.pages += pages
        places = np.asarray(pages, np.int64)[:, None] * page_tokens + np.arange(page_tokens)
        self.places = np.concatenate([self.places, places.ravel()])

    def forget(self) -> None:
        """Hold nothing: all is computed again, or found."""
        self.computed, self.pages, self.names = 0, [], []
        self.places = np.empty(0, np.int64)


class NativeRunner(RunnerThread):
    """First come, first served. Steps take a row of each stream that decodes, then prompts.

    A stream gets the pages of all its tokens at once, or waits. Where decoding then finds no page,
    the latest stream is put off and computed again later.
    """

    def __init__(self, model: NativeModel, meter: StepMeter, limits: EngineLimits) -> None:
        super().__init__()
        self._model = model
        scorer = PromptScorer(model.logits, vocab_size=model.vocab_size)
        self._steps, self._scorer = Steps(scorer, meter), scorer
        self._batch_tokens = limits.batch_tokens
        self._most = min(limits.max_requests, limits.batch_tokens)
        self.pages = Pages(-(-limits.kv_tokens // limits.page_tokens), limits.page_tokens)
        model.use_cache(self.pages.count * limits.page_tokens)
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._receive():
            self._drop_ended()
            self._admit()
            self._step()

    def _taken(self) -> list[Stream]:
        return [run.stream for run in (*self._running, *self._waiting)]

    def _receive(self) -> bool:
        """Take in what has come, waiting if there is nothing else to do; False is the end."""
        idle = not self._running and not self._waiting
        while idle or not self._come.empty():
            stream = self._come.get()
            if stream is None:
                return False
            self._waiting.append(_Run(stream))
            idle = False
        return True

    def _drop_ended(self) -> None:
        for run in [run for run in self._running if run.stream.ended]:
            self._let_go(run)
        self._waiting = deque(run for run in self._waiting if not run.stream.ended)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._most:
            run, size = self._waiting[0], self.pages.page_tokens
            # The last token is always computed, and a prompt that is to be scored is so wholly.
            shared = [] if run.stream.prompt_logprobs else run.tokens[:-1]
            names = page_names(shared, size)
            found = self.pages.find(names)
            pages = self.pages.hold(found, -(-len(run.tokens) // size) - len(found))
            if pages is None:
                return
            run.hold(pages, size)
            run.computed, run.names = len(found) * size, names[: len(found)]
            self._running.append(self._waiting.popleft())

    def _step(self) -> None:
        parts = self._plan()
        if not parts:
            return
        self._steps.begin(
            [
                Part(
                    stream=run.stream,
                    position=run.computed,
                    rows=rows,
                    yields_token=rows == run.left,
                )
                for run, rows in parts
            ]
        )
        spans = [range(run.computed, run.computed + rows) for run, rows in parts]
        tokens = [
            run.tokens[span.start : span.stop] for (run, _), span in zip(parts, spans, strict=True)
        ]
        hidden = self._model.forward(
            torch.tensor([token for part in tokens for token in part]),
            torch.tensor([position for span in spans for position in span]),
            self._paged(parts),
        )
        self._scorer.score(hidden)
        ends = np.cumsum([rows for _, rows in parts])
        yielding = [
            (run, end - 1) for (run, rows), end in zip(parts, ends, strict=True) if rows == run.left
        ]
        for run, rows in parts:
            run.computed += rows
            self._name_pages(run)
        self._steps.end(self._model.logits(hidden[[row for _, row in yielding]]))
        for run, _ in yielding:
            if not run.stream.ended:
                run.tokens.append(run.stream.tokens[-1])

    def _plan(self) -> list[tuple[_Run, int]]:
        """Who computes how many rows in the next step, in the order in which they came."""
        decoding = sum(run.left == 1 for run in self._running)
        budget = self._batch_tokens - decoding
        parts = []
        for run in list(self._running):
            rows = 1 if run.left == 1 else min(run.left, budget)
            if rows == 0 or run not in self._running or not self._has_room(run, rows):
                continue
            budget -= 0 if run.left == 1 else rows
            parts.append((run, rows))
        return parts

    def _has_room(self, run: _Run, rows: int) -> bool:
        """Have pages for so many rows more; False if the stream itself was put off for them."""
        while run.computed + rows > len(run.places):
            pages = self.pages.hold([], 1)
            if pages is not None:
                run.hold(pages, self.pages.page_tokens)
                continue
            latest = self._running[-1]
            self._let_go(latest)
            latest.forget()
            self._waiting.appendleft(latest)
            if latest is run:
                return False
        return True

    def _let_go(self, run: _Run) -> None:
        self._running.remove(run)
        self.pages.let_go(run.pages)

    def _name_pages(self, run: _Run) -> None:
        size, known = self.pages.page_tokens, len(run.names)
        before = run.names[-1] if known else b""
        new = page_names(run.tokens[known * size : run.computed], size, before)
        for page, name in zip(run.pages[known:], new, strict=False):
            self.pages.name(page, name)
        run.names += new

    def _paged(self, parts: list[tuple[_Run, int]]) -> Paged:
        """Where the step's rows are written, and what each stream's rows read: all up to them."""
        write = [run.places[run.computed : run.computed + rows] for run, rows in parts]
        read = [run.places[: run.computed + rows] for run, rows in parts]
        keys, values = self._model.caches[0]
        return Paged(
            keys,
            values,
            write=torch.from_numpy(np.concatenate(write)),
            row_ends=_ends(write),
            read_ends=_ends(read),
            read=torch.from_numpy(np.concatenate(read)),
        )


def _ends(parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> torch.Tensor:
    lengths = [0, *(len(part) for part in parts)]
    return torch.from_numpy(np.cumsum(lengths).astype(np.int32))
