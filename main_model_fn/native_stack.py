"""Layers of Llama's shape as one native call: what the kernel is told of them, and its buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from main_model_fn.express import ExpressLine
from main_model_fn.local_experts import NativeResidents
from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import NativeAttention, Paged
from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.native_norm import NativeNorm
from main_model_fn.native_stop import StepBuffers, Stop
from main_model_fn.split import LayerExperts
from main_model_fn.step_calls import StepCalls
from remoe.kernel.native_library import NativePool
from remoe.kernel.projector import StoredWeights
from remoe.kernel.structures import (
    NOT_POSTED,
    Attention,
    Decoding,
    Layer,
    Matrix,
    Norm,
    Projection,
    Projections,
    Routed,
    Router,
)

__all__ = ["DecoderLayer", "NativeStack"]

ComputeExperts = Callable[[int, Stop], None]
KeysAndValues = tuple[torch.Tensor, torch.Tensor]

_ROUNDING = 1e-2  # of a sum of bfloat16 numbers that is 1


class DecoderLayer(NamedTuple):
    """The modules of a layer of Llama's shape, and how its router weighs the chosen."""

    input_norm: NativeNorm
    attention: NativeAttention
    experts_norm: NativeNorm
    router: nn.Module
    experts: nn.Module
    normalized: bool
    gate_dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Module) -> DecoderLayer | None:
        """A layer's parts by their names; None if it has others, or they are not native."""
        names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gate")
        try:
            first, attention, second, router = (layer.get_submodule(name) for name in names)
            experts = layer.get_submodule("mlp.experts")
            _, gates, index = router(_rows(router.get_parameter("weight")))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None
        if (
            not isinstance(first, NativeNorm)
            or not isinstance(second, NativeNorm)
            or not isinstance(attention, NativeAttention)
            or not all(isinstance(norm, NativeNorm | None) for norm in attention.norms)
            or {name for name, _ in router.named_parameters()} != {"weight"}
            or not isinstance(getattr(router, "top_k", None), int)
            or index.dtype != torch.int64
            or gates.dtype not in KERNEL_DTYPES
        ):
            return None
        normalized = bool((gates.float().sum(-1) - 1).abs().max() < _ROUNDING)
        return cls(first, attention, second, router, experts, normalized, gates.dtype)

    @property
    def shape(self) -> tuple[object, ...]:
        """Layers of one shape can share their buffers."""
        weight = self.router.get_parameter("weight")
        return weight.shape, weight.dtype, self.router.top_k, *self.attention.columns


def _rows(weight: torch.Tensor) -> torch.Tensor:
    rows = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return rows.to(weight.dtype)


class _Buffers(StepBuffers):
    """And what the layers of a step hand to each other."""

    def __init__(self, rows: int, dtype: torch.dtype, layers: Sequence[DecoderLayer]) -> None:
        experts, width = layers[0].router.get_parameter("weight").shape
        top_k = cast("int", layers[0].router.top_k)
        super().__init__(rows, width, dtype, layers=len(layers), experts=experts, top_k=top_k)
        query, key, value = layers[0].attention.columns
        self.hidden, self.added, self.query, self.key, self.value, self.heads, self.logits = (
            torch.empty((rows, columns), dtype=dtype)
            for columns in (width, width, query, key, value, query, experts)
        )


class NativeStack:
    """Consecutive layers of one model, of equal shapes, as calls on buffers that they share."""

    def __init__(self, layers: Sequence[DecoderLayer], pool: NativePool) -> None:
        self._layers = layers
        self._pool = pool
        self._dtype = layers[0].router.get_parameter("weight").dtype
        self._residents: list[NativeResidents | None] = [None] * len(layers)
        self._caches: Sequence[KeysAndValues] = []
        self._lines: list[ExpressLine | None] = []
        self._hold(_Buffers(1, self._dtype, layers))

    def use(
        self,
        caches: Sequence[KeysAndValues],
        residents: Sequence[NativeResidents | None],
    ) -> None:
        """Say, before a step, where each layer's keys and values lie, and its experts here."""
        if caches is not self._caches:
            for call, (keys, values) in zip(self._each, caches, strict=True):
                call.attention.keys, call.attention.values = keys.data_ptr(), values.data_ptr()
            self._caches = caches
        for place, now in enumerate(residents):
            if now is not self._residents[place]:
                self._each[place].experts = self._experts(now)
                self._residents[place] = now

    def run(
        self,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        paged: Paged,
        compute: ComputeExperts,
        *,
        watched: bool = False,
        beside: bool = False,
        calls: StepCalls | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, width] through all layers to the same, and all routes [layers, rows, top_k].

        `paged` says who reads and writes where. `compute` is called with a layer's place where not
        all of its chosen experts are here, or at every layer if the step is `watched`, and
        computes them; `beside` says that others then compute on this machine's processors. Through
        `calls` a step of one row asks functions itself. Both results are overwritten by the next
        step.
        """
        rows = len(hidden)
        if rows > self._buffers.rows:
            self._hold(_Buffers(rows, self._dtype, self._layers))
        held, step = self._buffers, self._step
        held.hidden[:rows] = hidden
        cosine, sine = (part.reshape(rows, -1).contiguous() for part in angles)
        index = held.index[: len(self._layers) * rows * held.top_k]
        index = index.view(len(self._layers), rows, held.top_k)
        step.rows, step.requests, step.rotated = rows, len(paged.row_ends) - 1, cosine.shape[1]
        step.cosine, step.sine = cosine.data_ptr(), sine.data_ptr()
        step.write, step.read = paged.write.data_ptr(), paged.read.data_ptr()
        step.row_ends, step.read_ends = paged.row_ends.data_ptr(), paged.read_ends.data_ptr()
        step.layer = step.stopped = 0
        step.watched = watched
        step.spared = self._pool.spared if beside else 0
        held.answers["state"] = NOT_POSTED
        step.answers = held.answers.ctypes.data if calls else None
        if calls is None:
            self._go_on(compute)
        else:
            self._call_by(calls)
            calls.open()
            self._go_on(compute, calls.open)
            calls.book(held.answers)
        return held.hidden[:rows], index

    def _go_on(self, compute: ComputeExperts, before: Callable[[], None] = lambda: None) -> None:
        step = self._step
        self._pool.decode(step)
        while step.layer < step.layers:
            compute(step.layer, self._stop)
            before()
            self._pool.decode(step)

    def _call_by(self, calls: StepCalls) -> None:
        if calls.lines != self._lines:
            self._lines = calls.lines
            for call, line, number in zip(self._each, calls.lines, calls.numbers, strict=True):
                call.line, call.number = line and line.address, number

    def calls(
        self, splits: Sequence[LayerExperts], meter: StepMeter, rows: int
    ) -> StepCalls | None:
        """Those that a step of `rows` makes itself; None if its functions are not beside."""
        if rows != 1 or not splits[0].beside:
            return None
        held = self._buffers
        width = held.hidden.shape[1]
        return StepCalls(splits, meter, dtype=self._dtype, width=width, top_k=held.top_k)

    def _hold(self, held: _Buffers) -> None:
        self._buffers = held
        # The library has addresses of all of these: kept alive here.
        self._projections: list[ctypes.Array[Projection]] = []
        self._each = (Layer * len(self._layers))(*(self._call(layer) for layer in self._layers))
        caches, residents = self._caches, self._residents
        self._residents, self._caches = [None] * len(self._layers), []
        self._lines = []
        if caches:
            self.use(caches, residents)
        self._step = Decoding(
            width=held.hidden.shape[1],
            dtype=KERNEL_DTYPES[self._dtype],
            layers=len(self._layers),
            each=ctypes.addressof(self._each),
            hidden=held.hidden.data_ptr(),
            normed=held.normed.data_ptr(),
            added=held.added.data_ptr(),
            total=held.total.data_ptr(),
            index=held.index.data_ptr(),
            gate=held.gate.data_ptr(),
            elsewhere=held.elsewhere,
        )
        self._stop = Stop(held, self._step, self._pool)

    def _experts(self, residents: NativeResidents | None) -> Routed:
        held = self._buffers
        if residents is None:  # all of them are elsewhere
            call = Routed(experts=len(held.expert))
        else:
            call = Routed.from_buffer_copy(residents.table.call)
        call.top_k = held.top_k
        call.input = self._matrix(held.normed)
        call.output = held.total.data_ptr()
        return call

    def _call(self, layer: DecoderLayer) -> Layer:
        held, attention = self._buffers, layer.attention
        dtype = KERNEL_DTYPES[self._dtype]
        hidden, normed = held.hidden.data_ptr(), held.normed.data_ptr()
        router = layer.router.get_parameter("weight")
        experts = len(router)
        stored = StoredWeights(router.data_ptr(), dtype, experts)
        inputs = [linear.stored for linear in attention.projections]
        targets = [held.query, held.key, held.value]
        return Layer(
            input_norm=layer.input_norm.call(1, dtype, hidden, normed),
            query_norm=self._head_norm(attention.norms[0], held.query),
            key_norm=self._head_norm(attention.norms[1], held.key),
            experts_norm=layer.experts_norm.call(1, dtype, hidden, normed),
            inputs=self._projected(held.normed, inputs, targets),
            output=self._projected(held.heads, [attention.out.stored], [held.added]),
            logits=self._projected(held.normed, [stored], [held.logits]),
            attention=self._attention(attention.call),
            router=Router(
                experts=experts,
                top_k=held.top_k,
                normalized=layer.normalized,
                gate_dtype=KERNEL_DTYPES[layer.gate_dtype],
                logits=self._matrix(held.logits),
            ),
            experts=self._experts(None),
        )

    def _head_norm(self, norm: NativeNorm | None, part: torch.Tensor) -> Norm:
        """In place, over each head or over all of them: the norm's width says."""
        if norm is None:
            return Norm()
        address, rows = part.data_ptr(), part.shape[1] // len(norm.weight)
        return norm.call(rows, KERNEL_DTYPES[self._dtype], address, address)

    def _projected(
        self, source: torch.Tensor, weights: Sequence[StoredWeights], to: Sequence[torch.Tensor]
    ) -> Projections:
        each = (Projection * len(weights))(
            *(
                Projection(Matrix(w.address, w.dtype), w.bias, w.columns, target.data_ptr())
                for w, target in zip(weights, to, strict=True)
            )
        )
        self._projections.append(each)
        return Projections(
            width=source.shape[1],
            count=len(weights),
            dtype=KERNEL_DTYPES[self._dtype],
            input=self._matrix(source),
            projection=ctypes.addressof(each),
        )

    def _attention(self, template: Attention) -> Attention:
        held = self._buffers
        return Attention(
            heads=template.heads,
            groups=template.groups,
            width=template.width,
            dtype=template.dtype,
            scale=template.scale,
            query=held.query.data_ptr(),
            key=held.key.data_ptr(),
            value=held.value.data_ptr(),
            output=held.heads.data_ptr(),
        )

    def _matrix(self, held: torch.Tensor) -> Matrix:
        return Matrix(held.data_ptr(), KERNEL_DTYPES[self._dtype])
