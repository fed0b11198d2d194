"""Decoding steps beside a GPU: its part of all layers as CUDA graphs, between the host's experts.

The library's pass is captured for a number of rows and of keys, and cut in each MoE layer, where
the experts are. Steps with fewer rows or keys are filled up: those rows write to the cache's waste
page, and nobody looks at those keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from main_model_fn.beside_experts import SharedExperts, shared_experts, shared_replaced
from main_model_fn.exchange import Exchange
from main_model_fn.experts_modules import experts_by_layer
from main_model_fn.few_rows import FewRows
from main_model_fn.heterogeneous import HeterogeneousExperts, HeterogeneousResidents
from main_model_fn.host_inputs import moved
from main_model_fn.local_experts import ExpertsModule
from main_model_fn.machine import Machine
from main_model_fn.metering import StepMeter
from main_model_fn.model_gates import model_gates
from main_model_fn.routes import Batch
from main_model_fn.segments import Cut, nothing_freed, segments
from main_model_fn.split import LayerExperts
from remoe.errors import CheckpointError
from remoe.families import TOP_K_KEYS

__all__ = ["GraphedDecoder", "use_graphs"]

_log = structlog.get_logger()
_MOST_ROWS = 16
_FEWEST_KEYS = 256


class _Sent:
    """In place of a layer's experts: hands its input and routes to the host, takes the sum.

    What else the GPU can compute meanwhile it does.
    """

    def __init__(
        self,
        exchange: Exchange,
        cut: Cut,
        shared: SharedExperts | None,
        next_gate: torch.Tensor | None,
    ) -> None:
        self._exchange = exchange
        self._cut = cut
        self._shared = shared
        self._next_gate = next_gate

    def forward(
        self, _module: object, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        self._exchange.send(hidden, index, gates)
        self._cut.handed()
        self._exchange.keep(hidden)
        if self._next_gate is not None:
            self._exchange.foretell(hidden, self._next_gate)
        if self._shared is not None:
            self._shared.compute(hidden)
        self._cut()
        return self._exchange.receive()


class _Step:
    """The pass for `rows` new tokens of some requests that look at up to `keys` in all."""

    def __init__(
        self,
        decoder: GraphedDecoder,
        rows: int,
        keys: int,
        cache: PagedAttentionCache,
        given: Mapping[str, Any],
    ) -> None:
        self._decoder = decoder
        device, dtype = decoder.device, decoder.dtype
        (allocator,) = cache.cache_allocators.values()
        self._unread, self._unwritten = allocator.read_trash_index, allocator.write_trash_index

        def whole(*shape: int, value: float = 0, kind: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=kind, device=device)

        self._tokens, self._positions = (whole(1, rows, kind=torch.int32) for _ in range(2))
        self._write = whole(rows, value=self._unwritten)
        self._read = whole(keys, value=self._unread)
        self._masked = torch.finfo(dtype).min
        self._mask = whole(1, 1, rows, keys, value=self._masked, kind=dtype)
        self._keys_before = 0
        self.exchange = Exchange(
            rows,
            decoder.machine.like.shape[1],
            decoder.top_k,
            decoder.machine.slices,
            dtype=dtype,
            device=device,
        )
        self.few_rows = FewRows(decoder.machine, self.exchange)
        self.routes = np.zeros((decoder.layers, rows, decoder.top_k), np.int64)
        self._rows = 0  # of the pass that runs
        kwargs = {
            **given,
            "attention_mask": self._mask,
            "write_index": [self._write],
            "read_index": [self._read],
        }

        def forward(cut: Cut) -> torch.Tensor:
            with decoder.experts_replaced(self.exchange, cut):
                return cast(
                    "torch.Tensor",
                    decoder.library(
                        input_ids=self._tokens, position_ids=self._positions, **kwargs
                    ).last_hidden_state,
                )

        self._pass = segments(forward, device)

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """[1, rows] of tokens through all layers to [1, rows, width]."""
        rows, keys = tokens.shape[1], len(kwargs["read_index"][0])
        self._tokens[:, :rows].copy_(tokens, non_blocking=True)
        self._positions[:, :rows].copy_(positions, non_blocking=True)
        self._write[:rows].copy_(kwargs["write_index"][0], non_blocking=True)
        if rows < len(self._write):
            self._write[rows:] = self._unwritten
            self._mask[:, :, rows:] = self._masked
        self._read[:keys].copy_(kwargs["read_index"][0], non_blocking=True)
        self._mask[:, :, :rows, :keys].copy_(kwargs["attention_mask"], non_blocking=True)
        if keys < self._keys_before:
            self._read[keys:] = self._unread
            self._mask[..., keys:] = self._masked
        self._keys_before = keys

        self._rows = rows
        return self._pass.run(self)[:, :rows]

    def prepare(self, cut: int) -> None:
        self.few_rows.prepare(self._decoder.residents(cut))

    def begin(self, cut: int) -> None:
        """One layer's experts, into the exchange."""
        rows, exchange, decoder = self._rows, self.exchange, self._decoder
        decoder.observe(cut, exchange, rows)
        following = decoder.residents(cut + 1) if cut + 1 < decoder.layers else None
        if not self.few_rows.begin(decoder.residents(cut), rows, following):
            exchange.answer(decoder.compute(cut, exchange.batch(rows)))
        self.routes[cut, :rows] = exchange.index(rows).numpy()

    def finish(self, cut: int) -> None:
        self.few_rows.finish()


class GraphedDecoder:
    """In place of a model body's `forward`, for steps of continuous batching; others pass on.

    What it is given may lie on the host (host_inputs.py).
    """

    def __init__(
        self,
        body: nn.Module,
        modules: Mapping[int, nn.Module],
        meter: StepMeter,
        gates: Mapping[int, torch.Tensor],
    ) -> None:
        self.library = body.forward
        self._modules = list(modules.values())
        self._shared = shared_experts(body, modules)
        self._splits: list[LayerExperts] = [cast("Any", m).remoe for m in self._modules]
        self._numbers = [split.layer for split in self._splits]
        self._meter = meter
        local = cast("HeterogeneousExperts", self._splits[0].local)
        self.machine: Machine = local.machine
        self.device = self.machine.device
        config = cast("Any", body).config.get_text_config()
        self.dtype, self.layers = cast("Any", body).dtype, len(self._splits)
        # Of the layer after each.
        self._next_gates = [*(gates.get(layer) for layer in self._numbers[1:]), None]
        self.top_k = next(int(getattr(config, k)) for k in TOP_K_KEYS if hasattr(config, k))
        self._cache: PagedAttentionCache | None = None
        self._steps: dict[tuple[int, int], _Step | None] = {}

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's: `input_ids` and `position_ids` [1, rows] of all requests of a step."""
        step = None
        if input_ids is not None and position_ids is not None and _is_decoding(input_ids, kwargs):
            step = self._step(input_ids.shape[1], kwargs)
        if step is None or input_ids is None or position_ids is None:
            return self.by_library(input_ids=input_ids, position_ids=position_ids, **kwargs)
        with torch.no_grad():
            hidden = step.run(input_ids, position_ids, kwargs)
        self._meter.record_all_routes(self._numbers, step.routes[:, : input_ids.shape[1]])
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def by_library(self, **given: Any) -> Any:
        """The library's pass, of what may lie on the host."""
        return self.library(**moved(given, self.device))

    @contextmanager
    def experts_replaced(self, exchange: Exchange, cut: Cut) -> Iterator[None]:
        with shared_replaced(self._shared) as shared:
            for module, one, gate in zip(self._modules, shared, self._next_gates, strict=True):
                module.remoe = _Sent(exchange, cut, one, gate)  # type: ignore[assignment]
            try:
                yield
            finally:
                for module, split in zip(self._modules, self._splits, strict=True):
                    module.remoe = split  # type: ignore[assignment]

    def residents(self, place: int) -> HeterogeneousResidents:
        """The local experts that a layer has now."""
        return cast("HeterogeneousResidents", self._splits[place].local.residents)

    def compute(self, place: int, batch: Batch) -> torch.Tensor:
        """A layer's experts, remote ones too."""
        return self._splits[place].compute(cast("ExpertsModule", self._modules[place]), batch)

    def observe(self, place: int, exchange: Exchange, rows: int) -> None:
        split = self._splits[place]
        if split.observe is not None:
            split.observe(split.layer, exchange.rows[:rows].clone(), exchange.index(rows))

    def _step(self, rows: int, kwargs: Mapping[str, Any]) -> _Step | None:
        """The pass for at least so many rows and the keys of `kwargs`; None if there can be none."""
        cache = kwargs["cache"]
        if cache is not self._cache:
            self._cache, self._steps = cache, {}
        rows = 1 << (rows - 1).bit_length()
        keys = max(_FEWEST_KEYS, 1 << (len(kwargs["read_index"][0]) - 1).bit_length())
        if (rows, keys) not in self._steps:
            self._steps[rows, keys] = self._new_step(rows, keys, kwargs)
        return self._steps[rows, keys]

    def _new_step(self, rows: int, keys: int, kwargs: Mapping[str, Any]) -> _Step | None:
        try:
            with torch.no_grad(), nothing_freed():
                step = _Step(self, rows, keys, kwargs["cache"], moved(kwargs, self.device))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            _log.warning("step_not_captured", rows=rows, keys=keys, error=str(error))
            return None
        _log.info("step_captured", rows=rows, keys=keys)
        return step


def _is_decoding(tokens: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a step is of few tokens that look at cached ones, by one kind of attention."""
    cache, read, mask = (kwargs.get(name) for name in ("cache", "read_index", "attention_mask"))
    return (
        isinstance(cache, PagedAttentionCache)
        and tokens.shape[1] <= _MOST_ROWS
        and read is not None
        and len(read) == 1
        and len(read[0]) > 0
        and isinstance(mask, torch.Tensor)
        and kwargs.get("block_table") is None
    )


def use_graphs(model: PreTrainedModel, meter: StepMeter) -> None:
    """Have a model's decoding steps captured whose experts are all a machine's."""
    body, modules = model.base_model, experts_by_layer(model)
    locals_here = [cast("Any", module).remoe.local for module in modules.values()]
    if all(isinstance(local, HeterogeneousExperts) for local in locals_here):
        try:
            gates = {layer: gate.to(body.dtype) for layer, gate in model_gates(model).items()}
        except CheckpointError as error:
            _log.warning("experts_not_foretold", reason=error.message)
            gates = {}
        body.forward = GraphedDecoder(body, modules, meter, gates)
