"""How each model family names and lays out its expert tensors in published checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from remoe.errors import CheckpointError
from remoe.experts import ExpertId

__all__ = ["EXPERTS_KEYS", "FAMILIES", "TOP_K_KEYS", "Family", "Layout", "family_of"]

# Where config.json says how many experts a layer has, and how many a token goes to: a family's
# name for it has changed between versions of transformers, so that any of them is read.
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_k")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names with `{layer}`, and `{expert}` where each expert has tensors of its own.

    Without `{expert}` a tensor is *stacked*: its first dimension counts the experts. If `gate` and
    `up` are one name, that tensor is *fused*: the gate's rows, then up's, or by turns if
    `interleaved`. Matrices are [out, in], or [in, out] if `transposed`. `bias` is what a biased
    family appends to a weight's name.
    """

    gate: str
    up: str
    down: str
    interleaved: bool = False
    transposed: bool = False
    bias: str | None = None

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.down

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """Each tensor's name once, weights before biases."""
        weights = tuple(dict.fromkeys((self.gate, self.up, self.down)))
        biases = () if self.bias is None else tuple(name + self.bias for name in weights)
        return weights + biases

    @property
    def summary(self) -> str:
        """For people."""
        words = ["stacked" if self.stacked else "one by one"]
        words += [word for word in ("fused", "interleaved", "transposed") if getattr(self, word)]
        return ", ".join([*words, "biased"] if self.bias else words)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    `renames` turn a checkpoint's names into the module names of transformers 5, for all tensors
    that are not an expert's; shared experts are among those. A `recurrent` family has layers with
    a state that is no key-value cache, which transformers' continuous batching has no room for:
    its requests are served one after another.
    """

    model_type: str
    title: str
    layout: Layout
    renames: tuple[tuple[str, str], ...] = ()
    clamped: bool = False
    recurrent: bool = False

    @cached_property
    def _expert_pattern(self) -> re.Pattern[str]:
        alternatives = "|".join(
            re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
            for name in self.layout.templates
        )
        return re.compile(alternatives)

    def expert_names(self, expert: ExpertId) -> tuple[str, ...]:
        """The tensors that hold one expert: gate, up and down, or fewer if fused, then biases."""
        return tuple(
            name.format(layer=expert.layer, expert=expert.index) for name in self.layout.templates
        )

    def is_expert(self, tensor_name: str) -> bool:
        return self._expert_pattern.fullmatch(tensor_name) is not None

    def module_name(self, tensor_name: str) -> str:
        """The name a non-expert tensor has in the transformers module."""
        for old, new in self.renames:
            tensor_name = tensor_name.replace(old, new)
        return tensor_name


def _one_by_one(experts: str, gate: str, up: str, down: str) -> Layout:
    prefix = f"model.layers.{{layer}}.{experts}.{{expert}}"
    return Layout(
        gate=f"{prefix}.{gate}.weight", up=f"{prefix}.{up}.weight", down=f"{prefix}.{down}.weight"
    )


def _stacked(gate_up: str, down: str) -> Layout:
    prefix = "model.layers.{layer}.block_sparse_moe"
    return Layout(gate=f"{prefix}.{gate_up}", up=f"{prefix}.{gate_up}", down=f"{prefix}.{down}")


_MIXTRAL = _one_by_one("block_sparse_moe.experts", "w1", "w3", "w2")
_QWEN = _one_by_one("mlp.experts", "gate_proj", "up_proj", "down_proj")
_JAMBA = _one_by_one("feed_forward.experts", "gate_proj", "up_proj", "down_proj")
_LFM2 = _one_by_one("feed_forward.experts", "w1", "w3", "w2")
_GRANITE = _stacked("input_linear.weight", "output_linear.weight")
_GRANITE_SWA = _stacked("experts.gate_up_proj", "experts.down_proj")
_GPT_OSS = Layout(
    gate="model.layers.{layer}.mlp.experts.gate_up_proj",
    up="model.layers.{layer}.mlp.experts.gate_up_proj",
    down="model.layers.{layer}.mlp.experts.down_proj",
    interleaved=True,
    transposed=True,
    bias="_bias",
)
_GRANITE_ROUTER = ((".router.layer.weight", ".router.weight"),)


def _family(
    model_type: str,
    title: str,
    layout: Layout,
    *renames: tuple[str, str],
    clamped: bool = False,
    recurrent: bool = False,
) -> Family:
    return Family(
        model_type=model_type,
        title=title,
        layout=layout,
        renames=renames,
        clamped=clamped,
        recurrent=recurrent,
    )


_MLP = (".block_sparse_moe.", ".mlp.")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _family("mixtral", "Mixtral", _MIXTRAL, _MLP),
        _family("minimax", "MiniMax-01", _MIXTRAL, _MLP, recurrent=True),
        _family("minimax_m2", "MiniMax-M2", _MIXTRAL, _MLP),
        _family(
            "phimoe",
            "Phi-3.5-MoE",
            _MIXTRAL,
            (".block_sparse_moe.gate.", ".mlp.router."),
        ),
        _family("qwen2_moe", "Qwen1.5-MoE, Qwen2-MoE", _QWEN),
        _family("qwen3_moe", "Qwen3-MoE", _QWEN),
        _family("qwen3_next", "Qwen3-Next", _QWEN, recurrent=True),
        _family("olmoe", "OLMoE", _QWEN),
        _family("flex_olmo", "FlexOlmo", _QWEN),
        _family("deepseek_v2", "DeepSeek-V2", _QWEN),
        _family("deepseek_v3", "DeepSeek-V3, DeepSeek-R1", _QWEN),
        _family("glm4_moe", "GLM-4.5, GLM-4.6", _QWEN),
        _family("glm4_moe_lite", "GLM-4.7-Flash", _QWEN),
        _family("dots1", "dots.llm1", _QWEN),
        _family("solar_open", "Solar-Open", _QWEN),
        _family(
            "ernie4_5_moe",
            "ERNIE-4.5-MoE",
            _QWEN,
            (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
        ),
        _family(
            "exaone_moe",
            "K-EXAONE",
            _QWEN,
            (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
        ),
        _family("afmoe", "Trinity (AFMoE)", _QWEN),
        _family("mellum", "Mellum 2", _QWEN),
        _family("cohere2_moe", "Command (Cohere2-MoE)", _QWEN),
        _family("jamba", "Jamba", _JAMBA, recurrent=True),
        _family("lfm2_moe", "LFM2-MoE", _LFM2, recurrent=True),
        _family("granitemoe", "Granite-MoE", _GRANITE, *_GRANITE_ROUTER),
        _family(
            "granitemoeshared",
            "Granite-MoE, shared experts",
            _GRANITE,
            *_GRANITE_ROUTER,
        ),
        _family("granitemoehybrid", "Granite 4.0-H", _GRANITE, *_GRANITE_ROUTER, recurrent=True),
        _family("granitemoe_swa", "Granite-MoE, sliding", _GRANITE_SWA),
        _family("gpt_oss", "GPT-OSS (16-bit)", _GPT_OSS, clamped=True),
    )
}


def family_of(model_type: str) -> Family:
    """Look up a family; raises CheckpointError that lists the supported ones."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise CheckpointError(
            f"models of type {model_type!r} are not supported yet; supported: "
            f"{', '.join(sorted(FAMILIES))}. A family is one row of remoe/families.py."
        ) from None
