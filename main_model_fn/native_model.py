"""A model that the kernel computes whole, built from its checkpoint without the library.

Families of Llama's shape with experts in every layer, and nothing in their configuration that asks
for more. All others are built by transformers (loading.py), whose import takes longer than all
else of a start, and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from main_model_fn.local_experts import NativeResidents
from main_model_fn.long_prompts import is_long, run_layers
from main_model_fn.metering import StepMeter
from main_model_fn.native_attention import NativeAttention, Paged
from main_model_fn.native_dtypes import KERNEL_DTYPES
from main_model_fn.native_linear import NativeLinear
from main_model_fn.native_norm import NativeNorm
from main_model_fn.native_stack import DecoderLayer, KeysAndValues, NativeStack
from main_model_fn.native_stop import Stop
from main_model_fn.split import LayerExperts
from remoe.checkpoint import Checkpoint
from remoe.kernel.native_library import NativePool

__all__ = ["NativeModel", "NativeShape"]

# By family: whether the weights of the chosen experts always sum to 1, and are kept in float32.
_FAMILIES = {"mixtral": True, "qwen3_moe": False, "olmoe": False}
# Each asks for something that is not computed here, unless it is absent, null, false or empty.
_OTHERWISE = ("attention_bias", "clip_qkv", "mlp_only_layers", "rope_scaling", "use_sliding_window")


@dataclass(frozen=True, kw_only=True)
class NativeShape:
    """What config.json and the tensors' names say of such a model."""

    heads: int
    groups: int
    width: int
    epsilon: float
    theta: float
    normalized: bool
    wide_gates: bool
    head_norms: bool
    tied: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> NativeShape | None:
        """None if the model may be of another shape, or config.json leaves anything to guess."""
        config, model_type = checkpoint.config, checkpoint.family.model_type
        rope = {"rope_theta": config.get("rope_theta")}
        rope |= cast("dict[str, object]", config.get("rope_parameters") or {})
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        slides = config.get("sliding_window") and config.get("use_sliding_window", True)
        normalized = _FAMILIES.get(model_type) or config.get("norm_topk_prob")
        numbers = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
        width = config.get("head_dim") or checkpoint.hidden_size // int(str(numbers[0] or 1))
        reals = [config.get("rms_norm_eps"), rope["rope_theta"]]
        if (
            model_type not in _FAMILIES
            or dtype not in KERNEL_DTYPES
            or slides
            or not isinstance(normalized, bool)
            or any(config.get(key) for key in _OTHERWISE)
            or rope.get("rope_type", "default") != "default"
            or any(one.get("partial_rotary_factor", 1) != 1 for one in (config, rope))
            or checkpoint.moe_layers != tuple(range(checkpoint.layers))
            or not all(isinstance(number, int) for number in (*numbers, width))
            or not all(isinstance(real, int | float) for real in reals)
        ):
            return None
        names = {checkpoint.family.module_name(name) for name in checkpoint.non_expert_names}
        heads, groups = cast("list[int]", numbers)
        epsilon, theta = cast("list[float]", reals)
        shape = cls(
            heads=heads,
            groups=groups,
            width=cast("int", width),
            epsilon=float(epsilon),
            theta=float(theta),
            normalized=normalized,
            wide_gates=_FAMILIES[model_type],
            head_norms="model.layers.0.self_attn.q_norm.weight" in names,
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=cast("torch.dtype", dtype),
        )
        return (
            shape
            if names - {_HEAD} == shape.names(checkpoint.layers) - {_HEAD}
            and (shape.tied or _HEAD in names)
            else None
        )

    def names(self, layers: int) -> set[str]:
        """Of all tensors but experts'."""
        parts = ["input_layernorm", "post_attention_layernorm", "mlp.gate"]
        parts += [f"self_attn.{part}_proj" for part in "qkvo"]
        parts += [f"self_attn.{part}_norm" for part in "qk" if self.head_norms]
        each = {f"model.layers.{n}.{part}.weight" for n in range(layers) for part in parts}
        return {*each, _EMBEDDINGS, "model.norm.weight", _HEAD}


_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class NativeModel:
    """Embeddings, layers as one native call, norm and head. `tensors` are by the library's names."""

    def __init__(
        self,
        shape: NativeShape,
        tensors: Mapping[str, torch.Tensor],
        experts: Sequence[LayerExperts],
        *,
        top_k: int,
        pool: NativePool,
        meter: StepMeter,
    ) -> None:
        self._embeddings = tensors[_EMBEDDINGS]
        self.vocab_size, self.dtype = len(self._embeddings), self._embeddings.dtype
        self._splits = list(experts)
        # As in a library's model: what has a layer's experts can be given others.
        self.experts: dict[int, nn.Module] = {}
        for split in experts:
            module = self.experts[split.layer] = nn.Module()
            module.remoe = split  # type: ignore[assignment]  # not a submodule
        make = _Layers(shape, tensors, pool)
        self._layers = [
            make.layer(number, module, top_k) for number, module in self.experts.items()
        ]
        self._norm = make.norm("model.norm")
        self._head = make.linear("model.embed_tokens" if shape.tied else "lm_head")
        self._stack = NativeStack(self._layers, pool)
        self._meter = meter
        self._shape = shape
        exponents = torch.arange(0, shape.width, 2, dtype=torch.float32) / shape.width
        self._frequencies = 1.0 / shape.theta**exponents
        self.caches: list[KeysAndValues] = []

    def use_cache(self, places: int) -> None:
        """Make room for the keys and values of so many tokens; memory is taken as it is written."""
        shape = (len(self._layers), 2, places, self._shape.groups, self._shape.width)
        self.caches = [(layer[0], layer[1]) for layer in torch.empty(shape, dtype=self.dtype)]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
        """Rows of all requests of a step, each with its position, to hidden states [rows, hidden]."""
        hidden = functional.embedding(tokens, self._embeddings)
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cosine, sine = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        if is_long(paged):
            hidden = run_layers(self._layers, self.caches, hidden, (cosine, sine), paged)
        else:
            hidden = self._at_once(hidden, (cosine, sine), paged)
        return self._norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [rows, vocab] of what `forward` returns, or rows of it."""
        logits: torch.Tensor = self._head(hidden)
        return logits.float()

    def _at_once(
        self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], paged: Paged
    ) -> torch.Tensor:
        splits: list[LayerExperts] = [cast("Any", one).remoe for one in self.experts.values()]
        residents = [cast("NativeResidents", split.local.residents) for split in splits]
        self._stack.use(self.caches, residents)

        def answer(place: int, stop: Stop) -> None:
            splits[place].answer(cast("Any", self.experts[place]), stop)

        watched = any(split.observe is not None for split in splits)
        beside = splits[0].beside
        hidden, index = self._stack.run(
            hidden,
            angles,
            paged,
            answer,
            watched=watched,
            beside=beside,
            calls=self._stack.calls(splits, self._meter, len(hidden)),
        )
        self._meter.record_all_routes(list(self.experts), index.numpy())
        return hidden


class _Layers:
    """Makes native modules of tensors."""

    def __init__(
        self, shape: NativeShape, tensors: Mapping[str, torch.Tensor], pool: NativePool
    ) -> None:
        self._shape, self._tensors, self._pool = shape, tensors, pool

    def _parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self._tensors[f"{name}.weight"], requires_grad=False)

    def norm(self, name: str) -> NativeNorm:
        module = nn.Module()
        module.weight = self._parameter(name)
        return NativeNorm(module, self._shape.epsilon, self._pool)

    def linear(self, name: str) -> NativeLinear:
        weight = self._parameter(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = weight
        return NativeLinear(linear, self._pool)

    def layer(self, number: int, experts: nn.Module, top_k: int) -> DecoderLayer:
        shape, prefix = self._shape, f"model.layers.{number}"
        router = nn.Module()
        router.weight, router.top_k = self._parameter(f"{prefix}.mlp.gate"), top_k  # type: ignore[assignment]
        return DecoderLayer(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            attention=self._attention(f"{prefix}.self_attn", number),
            experts_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            router=router,
            experts=experts,
            normalized=shape.normalized,
            gate_dtype=torch.float32 if shape.wide_gates else router.get_parameter("weight").dtype,
        )

    def _attention(self, prefix: str, number: int) -> NativeAttention:
        module: Any = nn.Module()
        for part in "qkvo":
            setattr(module, f"{part}_proj", self.linear(f"{prefix}.{part}_proj"))
        for part in "qk" if self._shape.head_norms else "":
            setattr(module, f"{part}_norm", self.norm(f"{prefix}.{part}_norm"))
        module.head_dim, module.layer_idx = self._shape.width, number
        module.scaling = self._shape.width**-0.5
        return NativeAttention(module, self._pool)
