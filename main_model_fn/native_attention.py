"""Attention of decoded tokens on the native kernel: three calls where the library makes forty.

Rotation, cache update, scores and sums of all requests in a step are one call, which reads the
paged cache where it lies: no gathered copy of it, and no mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.native_linear import NativeLinear
from remoe.kernel.native_library import NativePool
from remoe.kernel.projector import Projector
from remoe.kernel.structures import Attention

__all__ = ["MOST_KEYS", "MOST_ROWS", "NativeAttention", "Paged", "normed_heads", "paged_step"]

# What some families do to scores or projections, and a short prompt may not show.
_OTHERWISE = ("sinks", "softcap", "attn_logit_softcapping", "clip_qkv")

# The library's matrix products win where many rows meet many keys.
MOST_ROWS, MOST_KEYS = 8, 1024


class Paged(NamedTuple):
    """A layer's cache, [places, groups, width] each, and who of a step reads and writes where.

    `write` are the new tokens' places, `read` those of all a request's tokens, old and new; the
    ends, from 0 on, part rows and places to read between requests.
    """

    keys: torch.Tensor
    values: torch.Tensor
    write: torch.Tensor
    row_ends: torch.Tensor
    read_ends: torch.Tensor
    read: torch.Tensor


class NativeAttention(nn.Module):
    """An attention of Llama's shape, with or without biases and with norms of queries and keys.

    Calls that it does not know go to the library's module: long prompts, sliding windows, and any
    use outside of continuous batching.
    """

    def __init__(self, attention: nn.Module, pool: NativePool) -> None:
        super().__init__()
        self.library = attention
        self._layer: int = cast("Any", attention).layer_idx
        self._pool = pool
        self.norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        projections = self.projections = _projections(attention)
        self.out = cast("NativeLinear", attention.get_submodule("o_proj"))
        dtype = projections[0].weight.dtype
        self.columns = [linear.out_features for linear in projections]
        self._project = Projector(
            pool,
            [linear.stored for linear in projections],
            width=projections[0].in_features,
            dtype=KERNEL_DTYPES[dtype],
        )
        width = _width(attention)
        self.call = Attention(  # of no rows
            heads=self.columns[0] // width,
            groups=self.columns[1] // width,
            width=width,
            dtype=KERNEL_DTYPES[dtype],
            scale=cast("Any", attention).scaling,
        )
        self._returns_pair = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's: `hidden_states` [1, rows, hidden] of all requests of a step."""
        paged = paged_step(kwargs, self._layer)
        if paged is None or position_embeddings is None:
            return self.library(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        output = self._attend(hidden_states[0], position_embeddings, paged)[None]
        return (output, None) if self._returns_pair else output

    def _attend(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: Paged,
    ) -> torch.Tensor:
        """[rows, hidden] to the same."""
        hidden = hidden.contiguous()
        rows = len(hidden)
        query, key, value = (hidden.new_empty((rows, columns)) for columns in self.columns)
        self._project(rows, hidden.data_ptr(), (query.data_ptr(), key.data_ptr(), value.data_ptr()))
        query, key = (
            part if norm is None else normed_heads(part, norm, self.call.width)
            for part, norm in zip((query, key), self.norms, strict=True)
        )
        cosine, sine = (part.reshape(rows, -1).contiguous() for part in position_embeddings)
        output = torch.empty_like(query)
        call = self.call
        call.rows, call.requests, call.rotated = rows, len(paged.row_ends) - 1, cosine.shape[1]
        call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        call.cosine, call.sine = cosine.data_ptr(), sine.data_ptr()
        call.keys, call.values = paged.keys.data_ptr(), paged.values.data_ptr()
        call.write, call.read = paged.write.data_ptr(), paged.read.data_ptr()
        call.row_ends, call.read_ends = paged.row_ends.data_ptr(), paged.read_ends.data_ptr()
        call.output = output.data_ptr()
        self._pool.attend(call)
        result: torch.Tensor = self.out(output)
        return result

    @classmethod
    def replacing(
        cls, attention: nn.Module, rotary: nn.Module | None, pool: NativePool
    ) -> NativeAttention | None:
        """The same as `attention`, or None if that is not what this computes.

        Families differ in ways that no name tells (how angles pair numbers, sinks, clipping), so
        the two are compared on one short prompt.
        """
        if rotary is None or not _has_the_shape(attention):
            return None
        native = cls(attention, pool)
        return native if native._agrees(rotary) else None

    def _agrees(self, rotary: nn.Module) -> bool:
        linear, rows = _projections(self.library)[0], 5
        dtype = linear.weight.dtype
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, rows, linear.in_features, generator=generator).to(dtype)
        mask = torch.full((rows, rows), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        try:
            angles = rotary(hidden, torch.arange(3, 3 + rows)[None])
            expected = self.library(hidden, position_embeddings=angles, attention_mask=mask)
            cosine, sine = angles
        except (TypeError, ValueError, RuntimeError, AttributeError):  # called otherwise
            return False
        if cosine.shape != sine.shape or cosine.shape[:-1] != (1, rows) or cosine.dtype != dtype:
            return False
        if cosine.shape[-1] % 2 or cosine.shape[-1] > self.call.width:
            return False
        self._returns_pair = isinstance(expected, tuple)
        if isinstance(expected, tuple):
            expected = expected[0]
        shape = (rows, self.call.groups, self.call.width)
        places, ends = torch.arange(rows), torch.tensor([0, rows], dtype=torch.int32)
        cache = Paged(hidden.new_zeros(shape), hidden.new_zeros(shape), places, ends, ends, places)
        got = self._attend(hidden[0], angles, cache).float()
        error = (got - expected[0].float()).abs().max()
        return bool(error <= 16 * torch.finfo(dtype).eps * expected.float().abs().max())


def _projections(attention: nn.Module) -> list[NativeLinear]:
    names = ("q_proj", "k_proj", "v_proj")
    return [cast("NativeLinear", getattr(attention, name)) for name in names]


def _width(attention: nn.Module) -> int:
    return int(cast("Any", attention).head_dim)


def _has_the_shape(attention: nn.Module) -> bool:
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(attention, name, None), NativeLinear) for name in linears):
        return False
    if not all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx")):
        return False
    asked = (attention, getattr(attention, "config", None))
    if any(getattr(one, name, None) is not None for one in asked for name in _OTHERWISE):
        return False
    query, key, value = _projections(attention)
    out, width = cast("NativeLinear", attention.o_proj), _width(attention)
    return (
        query.out_features == out.in_features
        and query.out_features % key.out_features == 0
        and key.out_features == value.out_features
        and key.out_features % width == 0
    )


def normed_heads(part: torch.Tensor, norm: nn.Module, width: int) -> torch.Tensor:
    """Over each head where the norm is as wide as one, over all of them where it is wider."""
    wide = norm.get_parameter("weight").shape[-1]
    normed: torch.Tensor = norm(part.view(len(part), -1, width) if wide == width else part)
    return normed.view(part.shape).contiguous()


def paged_step(kwargs: dict[str, Any], layer: int) -> Paged | None:
    """What continuous batching says of a step and a layer; None if that is not for the kernel."""
    # Told by what it has: its type would have to be imported, also where it is not used.
    allocators = getattr(kwargs.get("cache"), "layer_to_allocator", None)
    if allocators is None or kwargs.get("block_table") is not None:
        return None
    allocator = allocators[layer]
    kind = allocator.layer_type
    views = getattr(allocator, "_kv_token_views", None)
    if kind != "full_attention" or views is None:
        return None
    if kwargs["max_length_q"] > MOST_ROWS and kwargs["max_length_k"][kind] > MOST_KEYS:
        return None
    write = kwargs["write_index"][allocator.index]
    read = kwargs["read_index"][allocator.index]
    # Without old tokens the library gives no places to read: they are the new ones' own.
    places = read if read.numel() else write
    keys, values = views[layer]
    ends = (kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][kind])
    return Paged(keys, values, write, *ends, places)
