"""New tokens of some requests over a paged cache, and what attention should answer."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from remoe.kernel.native_library import NativePool
from remoe.kernel.structures import Attention

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Step:
    """New tokens of some requests, and a paged cache with their old ones."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    new: list[int]
    places: list[list[int]]

    def paging(self) -> dict[str, torch.Tensor]:
        """Who writes and reads where, by the names and in the order of `struct attention`."""
        write = [
            at for new, places in zip(self.new, self.places, strict=True) for at in places[-new:]
        ]
        return {
            "write": torch.tensor(write),
            "row_ends": torch.tensor([0, *np.cumsum(self.new)], dtype=torch.int32),
            "read_ends": torch.tensor(
                [0, *np.cumsum([len(places) for places in self.places])], dtype=torch.int32
            ),
            "read": torch.tensor([place for places in self.places for place in places]),
        }

    def attend(self, pool: NativePool) -> torch.Tensor:
        """[rows, heads, width]; the cache is changed as a step changes it."""
        rows, heads, width = self.query.shape
        paging = self.paging()
        output = torch.full_like(self.query, torch.nan)
        tensors = (self.query, self.key, self.value, self.cosine, self.sine, self.keys, self.values)
        pool.attend(
            Attention(
                rows,
                len(self.new),
                heads,
                self.key.shape[1],
                width,
                self.cosine.shape[1],
                DTYPES[self.query.dtype],
                width**-0.5,
                *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
                *(tensor.data_ptr() for tensor in paging.values()),
                output.data_ptr(),
            )
        )
        return output

    def expected(self) -> torch.Tensor:
        """The same in float64, after `attend` has put the new keys and values into the cache."""
        query = rotated(self.query.double(), self.cosine.double(), self.sine.double())
        sharing = self.query.shape[1] // self.key.shape[1]
        outputs, row = [], 0
        for new, places in zip(self.new, self.places, strict=True):
            keys, values = (
                cache[places].double().repeat_interleave(sharing, 1)
                for cache in (self.keys, self.values)
            )
            for r in range(new):
                seen = len(places) - new + r + 1
                scores = torch.einsum("hd,thd->ht", query[row], keys[:seen])
                weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
                outputs.append(torch.einsum("ht,thd->hd", weights, values[:seen]))
                row += 1
        return torch.stack(outputs)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    part, rest = x[..., : cosine.shape[1]], x[..., cosine.shape[1] :]
    first, second = part.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([part * cosine[:, None] + turned * sine[:, None], rest], -1)


def make_step(
    seed: int,
    groups: int,
    sharing: int,
    width: int,
    rotary: int,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    new = [n for _, n in lengths]
    rows, page = sum(new), 8
    tokens = [old + n for old, n in lengths]
    pages = [-(-count // page) for count in tokens]
    free = rng.permutation(sum(pages)).tolist()
    places = []
    for count, wanted in zip(tokens, pages, strict=True):
        mine = [free.pop() for _ in range(wanted)]
        places.append([mine[t // page] * page + t % page for t in range(count)])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.rand(rows, rotary // 2, generator=generator).repeat(1, 2) * 6
    cache = (sum(pages) * page, groups, width)
    return Step(
        normal(rows, groups * sharing, width),
        normal(rows, groups, width),
        normal(rows, groups, width),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        normal(*cache),
        normal(*cache),
        new,
        places,
    )
