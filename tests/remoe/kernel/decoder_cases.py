"""Random layers of a decoder, through one call and through a call for each of their parts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from remoe.kernel.native_kernel import ExpertTable, NativeKernel
from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import (
    Attention,
    Decoding,
    Elsewhere,
    Layer,
    Matrix,
    Norm,
    Projection,
    Projections,
    Router,
)
from tests.remoe.kernel.kernel_cases import random_case
from tests.remoe.kernel.paged_cases import DTYPES, make_step


@dataclass(frozen=True)
class Shape:
    layers: int
    groups: int
    sharing: int
    head: int
    width: int
    inner: int
    experts: int
    top_k: int
    dtype: torch.dtype
    normalized: bool
    head_norms: bool


class DecoderCase:
    """Tensors that end exactly where their numbers do, and the calls that point at them."""

    def __init__(
        self,
        pool: NativePool,
        shape: Shape,
        resident: list[list[int]],
        lengths: list[tuple[int, int]],
        seed: int,
    ) -> None:
        self.pool, self.shape = pool, shape
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = [
            make_step(
                seed + layer, shape.groups, shape.sharing, shape.head, 2, shape.dtype, lengths
            )
            for layer in range(shape.layers)
        ]
        self.rows = sum(new for _, new in lengths)
        self.x = self._normal(self.rows, shape.width)
        heads, groups = shape.groups * shape.sharing * shape.head, shape.groups * shape.head
        self.normed, self.added = self._normal(*self.x.shape), self._normal(*self.x.shape)
        self.query, self.heads = self._normal(self.rows, heads), self._normal(self.rows, heads)
        self.key, self.value = self._normal(self.rows, groups), self._normal(self.rows, groups)
        self.logits = self._normal(self.rows, shape.experts)
        self.total = torch.zeros(self.rows, shape.width)
        self.gate = torch.zeros(self.rows, shape.top_k)
        self.index = torch.zeros((shape.layers, self.rows, shape.top_k), dtype=torch.int64)
        rng = np.random.default_rng(seed)
        self._kept: list[object] = []
        self.tables = [self._table(rng, held) for held in resident]
        self.token = torch.zeros(self.rows, dtype=torch.int64)
        self.carried = self._normal(self.rows, shape.width)
        self.expert = torch.zeros(shape.experts, dtype=torch.int64)
        self.offsets = torch.zeros(shape.experts + 1, dtype=torch.int64)
        self.row_index = torch.zeros(self.rows * shape.top_k, dtype=torch.int32)
        self.gate_weight = torch.zeros(self.rows * shape.top_k)
        self.layers = (Layer * shape.layers)(*(self._layer(place) for place in range(shape.layers)))

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.shape.dtype)

    def _table(self, rng: np.random.Generator, held: list[int]) -> ExpertTable:
        shape = self.shape
        case = random_case(
            rng, hidden=shape.width, inner=shape.inner, rows=1, experts=shape.experts
        )
        kernel = NativeKernel(case.experts.__getitem__, self.pool)
        return kernel.table(0, held, experts=shape.experts, hidden=shape.width)

    def _at(self, held: torch.Tensor) -> Matrix:
        return Matrix(held.data_ptr(), DTYPES[held.dtype])

    def _norm(self, source: torch.Tensor, target: torch.Tensor, width: int) -> Norm:
        weight = torch.randn(width, generator=self._generator)
        self._kept.append(weight)
        rows = source.shape[1] // width
        return Norm(rows, width, self._at(source), weight.data_ptr(), 1e-5, target.data_ptr())

    def _project(self, source: torch.Tensor, *targets: torch.Tensor) -> Projections:
        each = (Projection * len(targets))()
        for one, target in zip(each, targets, strict=True):
            weights = self._normal(target.shape[1], source.shape[1])
            self._kept.append(weights)
            one.weights, one.columns = self._at(weights), len(weights)
            one.output = target.data_ptr()
        self._kept.append(each)
        dtype = DTYPES[source.dtype]
        address = ctypes.addressof(each)
        return Projections(source.shape[1], 0, len(each), dtype, self._at(source), address)

    def _layer(self, place: int) -> Layer:
        shape, step = self.shape, self.steps[place]
        experts = type(self.tables[place].call).from_buffer_copy(self.tables[place].call)
        experts.top_k, experts.input = shape.top_k, self._at(self.normed)
        experts.output = self.total.data_ptr()
        with_norms = shape.head_norms
        return Layer(
            self._norm(self.x, self.normed, shape.width),
            self._norm(self.query, self.query, shape.head) if with_norms else Norm(),
            self._norm(self.key, self.key, shape.groups * shape.head) if with_norms else Norm(),
            self._norm(self.x, self.normed, shape.width),
            self._project(self.normed, self.query, self.key, self.value),
            self._project(self.heads, self.added),
            self._project(self.normed, self.logits),
            Attention(
                heads=shape.groups * shape.sharing,
                groups=shape.groups,
                width=shape.head,
                dtype=DTYPES[shape.dtype],
                scale=shape.head**-0.5,
                query=self.query.data_ptr(),
                key=self.key.data_ptr(),
                value=self.value.data_ptr(),
                keys=step.keys.data_ptr(),
                values=step.values.data_ptr(),
                output=self.heads.data_ptr(),
            ),
            Router(
                experts=shape.experts,
                top_k=shape.top_k,
                normalized=shape.normalized,
                gate_dtype=DTYPES[shape.dtype],
                logits=self._at(self.logits),
            ),
            experts,
        )

    def together(
        self,
        *,
        watched: bool = False,
        line: int | None = None,
        answers: int | None = None,
        on_stop: Callable[[Decoding], bool] = lambda _: False,
    ) -> tuple[torch.Tensor, list[int]]:
        """[rows, width] after all layers by one call, and the layers at which it stopped.

        `on_stop` says whether what is here has been computed already.
        """
        hidden, stops = self.x.clone(), list[int]()
        for layer in self.layers:
            layer.input_norm.input = layer.experts_norm.input = self._at(hidden)
            layer.line, layer.number = line, 300
        paging = self.steps[0].paging()
        step = Decoding(
            answers=answers,
            rows=self.rows,
            width=self.shape.width,
            dtype=DTYPES[self.shape.dtype],
            layers=self.shape.layers,
            each=ctypes.addressof(self.layers),
            hidden=hidden.data_ptr(),
            normed=self.normed.data_ptr(),
            added=self.added.data_ptr(),
            total=self.total.data_ptr(),
            index=self.index.data_ptr(),
            gate=self.gate.data_ptr(),
            requests=len(self.steps[0].new),
            rotated=2,
            cosine=self.steps[0].cosine.data_ptr(),
            sine=self.steps[0].sine.data_ptr(),
            elsewhere=Elsewhere(
                token=self.token.data_ptr(),
                hidden=self.carried.data_ptr(),
                expert=self.expert.data_ptr(),
                offsets=self.offsets.data_ptr(),
                row_index=self.row_index.data_ptr(),
                gate_weight=self.gate_weight.data_ptr(),
            ),
            **{name: tensor.data_ptr() for name, tensor in paging.items()},
        )
        step.watched, step.spared = watched, self.shape.experts % 3
        self.pool.decode(step)
        while step.layer < step.layers:
            stops.append(step.layer)
            self._answer(step, computed=on_stop(step))
            self.pool.decode(step)
        return hidden, stops

    def _answer(self, step: Decoding, *, computed: bool) -> None:
        """Check what is said to be elsewhere, and send it back times the number of its routes."""
        index = self.index[step.layer]
        away = ~torch.isin(index, torch.tensor(sorted(self.tables[step.layer].experts)))
        found = step.elsewhere
        tokens = away.any(1).nonzero()[:, 0]
        assert self.token[: found.rows].tolist() == tokens.tolist()
        assert torch.equal(self.carried[: found.rows], self.normed[tokens])
        experts = sorted(set(index[away].tolist()))
        assert self.expert[: found.experts].tolist() == experts
        offsets = self.offsets[: found.experts + 1].tolist()
        assert (offsets[0], offsets[-1]) == (0, found.routes)
        for place, expert in enumerate(experts):
            routes = slice(offsets[place], offsets[place + 1])
            row, slot = (index == expert).nonzero(as_tuple=True)
            assert torch.equal(self.token[self.row_index[routes].long()], row)
            assert torch.equal(self.gate_weight[routes], self.gate[row, slot])
        if not computed:
            self.pool.decode_here(step)
        partial = self._elsewhere(self.carried[: found.rows], away[tokens])
        step.partial = partial.numpy().tobytes()

    @staticmethod
    def _elsewhere(rows: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
        """What experts that are elsewhere might give for rows with these routes to them."""
        return rows.float() * away.sum(1, keepdim=True)

    def one_by_one(self) -> tuple[torch.Tensor, list[int]]:
        """The same by a call for each part; sums of rows are torch's."""
        hidden, stops = self.x.clone(), list[int]()
        paging = self.steps[0].paging()
        for place, layer in enumerate(self.layers):
            layer.input_norm.input = layer.experts_norm.input = self._at(hidden)
            self._normalize(layer.input_norm)
            self._projections(layer.inputs)
            self._normalize(layer.query_norm)
            self._normalize(layer.key_norm)
            attention = type(layer.attention).from_buffer_copy(layer.attention)
            attention.rows, attention.requests = self.rows, len(self.steps[0].new)
            attention.rotated = 2
            attention.cosine = self.steps[0].cosine.data_ptr()
            attention.sine = self.steps[0].sine.data_ptr()
            for name, tensor in paging.items():
                setattr(attention, name, tensor.data_ptr())
            self.pool.attend(attention)
            self._projections(layer.output)
            hidden += self.added
            self._normalize(layer.experts_norm)
            self._projections(layer.logits)
            index = torch.zeros((self.rows, self.shape.top_k), dtype=torch.int64)
            router = type(layer.router).from_buffer_copy(layer.router)
            router.rows, router.index, router.gate = (
                self.rows,
                index.data_ptr(),
                self.gate.data_ptr(),
            )
            self.pool.choose(router)
            away = ~torch.isin(index, torch.tensor(sorted(self.tables[place].experts)))
            if away.any():
                stops.append(place)
            hidden += self._experts(place, index, away)
        return hidden, stops

    def _experts(self, place: int, index: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(self.total)
        self.tables[place].add(
            total.data_ptr(),
            self._at(self.normed),
            index.data_ptr(),
            self.gate.data_ptr(),
            (self.rows, self.shape.top_k),
        )
        total += self._elsewhere(self.normed, away)
        return total.to(self.shape.dtype)

    def _normalize(self, norm: Norm) -> None:
        if norm.weight:
            call = type(norm).from_buffer_copy(norm)
            call.rows *= self.rows
            self.pool.normalize(call)

    def _projections(self, projections: Projections) -> None:
        call = type(projections).from_buffer_copy(projections)
        call.rows = self.rows
        self.pool.project(call)


def random_decoder(
    rng: np.random.Generator,
    pool: NativePool,
    dtype: torch.dtype | None = None,
    *,
    one_row: bool = False,
) -> DecoderCase:
    """Some shape; half of the layers have all experts, the others some."""
    experts = int(rng.integers(1, 9))
    layers = int(rng.integers(1, 4))
    shape = Shape(
        layers=layers,
        groups=int(rng.integers(1, 4)),
        sharing=int(rng.integers(1, 4)),
        head=2 * int(rng.integers(1, 20)),
        width=int(rng.integers(1, 80)),
        inner=int(rng.integers(1, 60)),
        experts=experts,
        top_k=int(rng.integers(1, experts + 1)),
        dtype=dtype or list(DTYPES)[rng.integers(3)],
        normalized=bool(rng.integers(2)),
        head_norms=bool(rng.integers(2)),
    )
    resident = [
        [e for e in range(experts) if whole or rng.random() < 0.6]
        for whole in rng.integers(0, 2, layers)
    ]
    lengths = [(int(rng.integers(30)), int(rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
    if one_row:
        lengths = [(lengths[0][0], 1)]
    return DecoderCase(pool, shape, resident, lengths, int(rng.integers(2**31)))
