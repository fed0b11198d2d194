"""Latent attention (DeepSeek's) in transformers' paged cache, compressed as `generate` caches it.

Continuous batching caches what the attention function is called with: here the keys and values of
all heads, of unlike widths, which its cache cannot hold and which would be tens of times larger. So
each layer is given a cache that takes its latent vector and rotary key, before they are expanded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

__all__ = ["fit_latent_cache"]


class _Compressed:
    """The cache as a layer sees it: one head, latent and rotary key padded to one width."""

    def __init__(self, cache: PagedAttentionCache, width: int, step: dict[str, Any]) -> None:
        self._cache = cache
        self._width = width
        self._step = step  # where this step's tokens are read and written

    def update(
        self, latent: torch.Tensor, rotary: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, 1, tokens, width] each, and return all that the step's requests cached."""
        widths = latent.shape[-1], rotary.shape[-1]
        padded = [functional.pad(x, (0, self._width - x.shape[-1])) for x in (latent, rotary)]
        latents, rotaries = self._cache.update(*padded, layer_idx, dict(self._step))
        return latents[..., : widths[0]], rotaries[..., : widths[1]]


class _Expanded:
    """The cache as the attention function sees it: it is handed everything already."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def fit_latent_cache(model: PreTrainedModel) -> None:
    """Prepare a model for continuous batching, before that reads its configuration.

    Nothing changes for a model without latent attention, nor outside continuous batching.
    """
    config = model.config
    if getattr(config, "kv_lora_rank", None) is None:
        return

    width = max(config.kv_lora_rank, config.qk_rope_head_dim)

    def give_cache(
        _layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("cache")
        if isinstance(cache, PagedAttentionCache):
            compressed = _Compressed(cache, width, kwargs)
            kwargs = {**kwargs, "past_key_values": compressed, "cache": _Expanded()}
        return args, kwargs

    for module in model.modules():
        if hasattr(module, "kv_a_proj_with_mqa"):
            module.register_forward_pre_hook(give_cache, with_kwargs=True)
    # From here on read by the cache alone: the layers took theirs when they were built.
    config.num_key_value_heads = 1
    config.head_dim = width
