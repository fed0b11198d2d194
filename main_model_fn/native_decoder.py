"""All layers of a model in one native call a step: Python is asked only where an expert is remote.

Between two native calls a layer of the default model would spend more time in Python and torch,
whose code and data the layer's weights have driven out of the cache, than it takes to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from main_model_fn.local_experts import NativeResidents
from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import Paged, paged_step
from main_model_fn.native_stack import DecoderLayer, KeysAndValues, NativeStack
from main_model_fn.native_stop import Stop
from main_model_fn.split import LayerExperts, SplitModule
from remoe.kernel.native_library import NativePool

__all__ = ["NativeDecoder"]


class NativeDecoder:
    """In place of a model body's `forward`, for steps of continuous batching; others pass on."""

    def __init__(
        self, body: nn.Module, layers: Sequence[DecoderLayer], pool: NativePool, meter: StepMeter
    ) -> None:
        self._library = body.forward
        self._embed, self._rotary, self._norm = (
            body.get_submodule(name) for name in ("embed_tokens", "rotary_emb", "norm")
        )
        self._modules = [cast("SplitModule", layer.experts) for layer in layers]
        self._numbers = [split.layer for split in self._splits]
        self._stack = NativeStack(layers, pool)
        self._meter = meter
        self._cache: object = None
        self._caches: list[KeysAndValues] = []

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's: `input_ids` and `position_ids` [1, rows] of all requests of a step."""
        paged = None
        if input_ids is not None and position_ids is not None:
            paged = paged_step(kwargs, self._numbers[0])
        if paged is None or not self._knows(kwargs["cache"]):
            return self._library(input_ids=input_ids, position_ids=position_ids, **kwargs)
        hidden = self._embed(input_ids)
        angles = self._rotary(hidden, position_ids=position_ids)
        splits = self._splits
        residents = [cast("NativeResidents", split.local.residents) for split in splits]
        self._stack.use(self._caches, residents)
        watched = any(split.observe is not None for split in splits)
        beside = splits[0].beside
        hidden, index = self._stack.run(
            hidden[0],
            angles,
            paged,
            self._answer,
            watched=watched,
            beside=beside,
            calls=self._stack.calls(splits, self._meter, len(hidden[0])),
        )
        self._meter.record_all_routes(self._numbers, index.numpy())
        return MoeModelOutputWithPast(last_hidden_state=self._norm(hidden)[None])

    @property
    def _splits(self) -> list[LayerExperts]:
        return [module.remoe for module in self._modules]

    def _answer(self, place: int, stop: Stop) -> None:
        module = self._modules[place]
        module.remoe.answer(module, stop)

    def _knows(self, cache: Any) -> bool:
        """Whether all layers read and write the same places of it."""
        if cache is not self._cache:
            allocators = {id(cache.layer_to_allocator[layer]) for layer in self._numbers}
            views = cache.layer_to_allocator[self._numbers[0]]._kv_token_views  # noqa: SLF001
            self._caches = [views[n] for n in self._numbers] if len(allocators) == 1 else []
            self._cache = cache
        return bool(self._caches)

    @classmethod
    def replacing(cls, body: nn.Module, pool: NativePool, meter: StepMeter) -> NativeDecoder | None:
        """The same as `body`'s forward, or None if that is not what this computes.

        Layers are compared one by one on random rows, and what surrounds them without any.
        """
        parts = ("embed_tokens", "rotary_emb", "norm", "layers")
        modules = dict(body.named_children())
        if not all(name in modules for name in parts) or not _surrounds(body):
            return None
        layers = list[DecoderLayer]()
        for module in cast("nn.ModuleList", modules["layers"]):
            layer = DecoderLayer.of(module)
            if layer is None or not _agrees(module, layer, modules["rotary_emb"], pool):
                return None
            layers.append(layer)
        alike = len({layer.shape for layer in layers}) == 1
        return cls(body, layers, pool, meter) if alike else None


class _Unchanged(nn.Module):
    """In place of a layer, to see what surrounds the layers."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def _surrounds(body: nn.Module) -> bool:
    """Whether layers get embeddings as they are, and all that follows them is a norm."""
    layers = body.get_submodule("layers")
    tokens = torch.arange(5)[None]
    body.layers = nn.ModuleList([_Unchanged() for _ in layers.children()])
    try:
        found = body(input_ids=tokens, use_cache=False).last_hidden_state
    except (TypeError, ValueError, RuntimeError, AttributeError):  # layers are used otherwise
        return False
    finally:
        body.layers = layers
    norm, embed = body.get_submodule("norm"), body.get_submodule("embed_tokens")
    return torch.equal(found, norm(embed(tokens)))


class _SomeExperts:
    """In place of a layer's experts: a sum that depends on all that the experts' would."""

    def forward(
        self, module: object, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        weight = (gates.float() * (index + 1)).sum(-1, keepdim=True)
        return (hidden.float() * weight).to(hidden.dtype)

    def answer(self, stop: Stop) -> None:
        stop.total.copy_(self.forward(None, *stop.batch().given))


def _agrees(module: nn.Module, layer: DecoderLayer, rotary: nn.Module, pool: NativePool) -> bool:
    """Whether the kernel's layer gives the same as the library's, whatever the experts do."""
    weight, rows = layer.router.get_parameter("weight"), 8
    dtype = weight.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, weight.shape[1], generator=generator).to(dtype)
    mask = torch.full((rows, rows), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    some, experts = _SomeExperts(), cast("Any", layer.experts)
    own, experts.remoe = experts.remoe, some
    try:
        angles = rotary(hidden, torch.arange(3, 3 + rows)[None])
        expected = module(hidden, position_embeddings=angles, attention_mask=mask)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # called otherwise
        return False
    finally:
        experts.remoe = own
    expected = expected[0] if isinstance(expected, tuple) else expected
    call = layer.attention.call
    places, ends = torch.arange(rows), torch.tensor([0, rows], dtype=torch.int32)
    cache = tuple(hidden.new_zeros((rows, call.groups, call.width)) for _ in range(2))
    stack = NativeStack([layer], pool)
    stack.use([(cache[0], cache[1])], [None])
    got, _ = stack.run(
        hidden[0],
        angles,
        Paged(cache[0], cache[1], places, ends, ends, places),
        lambda _, stop: some.answer(stop),
    )
    error = (got.float() - expected[0].float()).abs().amax(-1)  # of each row
    close = error <= 16 * torch.finfo(dtype).eps * expected.float().abs().max()
    # Of two experts that are as likely in a short type, either may have been taken.
    return int(close.sum()) >= rows - (dtype != torch.float32)
