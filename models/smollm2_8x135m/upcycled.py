"""The upcycled model in the form it is trained in: frozen dense weights, routers and low-rank factors.

An expert is its dense base plus a low-rank change, so the dense products are done once a token, whichever
experts it goes to, and the change is a product with all experts' factors side by side, masked by the
routing. No token is gathered or sorted: a step costs little more than the dense model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models.smollm2_8x135m.recipe import Architecture, delta_name, delta_shapes

if TYPE_CHECKING:
    from models.smollm2_8x135m.gguf_base import GgufBase
    from models.smollm2_8x135m.recipe import FloatArray


class Dense(NamedTuple):
    """One layer's frozen weights."""

    input_norm: Tensor
    post_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class Factors(NamedTuple):
    """One layer's trained tensors, named and shaped as in `recipe.delta_shapes`."""

    gate: Tensor
    Agu: Tensor
    Bgu: Tensor
    Adn: Tensor
    Bdn: Tensor


class Rope(NamedTuple):
    """Rotary tables of the batch: [rows, 1, length, head_dim]."""

    cos: Tensor
    sin: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, as the reference model does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat((-second, first), dim=-1) * rope.sin


def _attention(x: Tensor, w: Dense, rope: Rope, mask: Tensor, head_dim: int) -> Tensor:
    rows, length, _ = x.shape
    q = F.linear(x, w.q).view(rows, length, -1, head_dim).transpose(1, 2)
    k = F.linear(x, w.k).view(rows, length, -1, head_dim).transpose(1, 2)
    v = F.linear(x, w.v).view(rows, length, -1, head_dim).transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    q, k = _rotate(q, rope), _rotate(k, rope)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(out.transpose(1, 2).reshape(rows, length, -1), w.o)


def router_input(  # noqa: PLR0917
    x: Tensor, w: Dense, rope: Rope, mask: Tensor, head_dim: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the stream after attention and what the router (and the experts) of this layer read."""
    x = x + _attention(rms_norm(x, w.input_norm, eps), w, rope, mask, head_dim)
    return x, rms_norm(x, w.post_norm, eps)


def dense_ffn(x: Tensor, w: Dense) -> Tensor:
    """The base model's feed-forward layer."""
    gate, up = F.linear(x, w.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w.down)


def expert_ffn(x: Tensor, w: Dense, f: Factors, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top-k mixture and the router's logits (float32): x [tokens, hidden] -> same, [tokens, experts]."""
    tokens = x.shape[0]
    experts, rank, hidden = f.Agu.shape
    dtype = x.dtype
    logits = F.linear(x, f.gate.to(dtype)).float()  # [tokens, experts]
    value, index = logits.softmax(-1).topk(top_k, dim=-1)  # [tokens, top_k]
    weight = (value / value.sum(-1, keepdim=True)).to(dtype)
    b_gu = f.Bgu.to(dtype).transpose(1, 2).reshape(experts * rank, -1)
    b_dn = f.Bdn.to(dtype).transpose(1, 2).reshape(experts * rank, -1)
    a_dn = f.Adn.to(dtype).reshape(experts * rank, -1)
    base = F.linear(x, w.gate_up)  # [tokens, 2 * intermediate]
    inner = F.linear(x, f.Agu.to(dtype).reshape(experts * rank, hidden))
    inner = inner.view(tokens, experts, rank)
    mixed = inner_down = None
    for slot in range(top_k):
        chosen = F.one_hot(index[:, slot], experts).to(dtype).unsqueeze(-1)  # [tokens, experts, 1]
        change = (inner * chosen).view(tokens, -1) @ b_gu
        gate, up = (base + change).chunk(2, dim=-1)
        act = F.silu(gate) * up * weight[:, slot, None]  # [tokens, intermediate]
        low = F.linear(act, a_dn).view(tokens, experts, rank) * chosen
        mixed = act if mixed is None else mixed + act
        inner_down = low if inner_down is None else inner_down + low
    assert mixed is not None  # noqa: S101
    assert inner_down is not None  # noqa: S101
    # Seen by the routing's own losses: they shape the routers, and leave the stream to the others.
    routed = F.linear(x.detach(), f.gate.to(dtype)).float()
    return F.linear(mixed, w.down) + inner_down.view(tokens, -1) @ b_dn, routed


class Upcycled(nn.Module):
    """The model in training form."""

    def __init__(
        self, arch: Architecture, base: GgufBase, rank: int, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        self.arch, self.rank, self.dtype = arch, rank, dtype
        generator = torch.Generator().manual_seed(seed)
        self.trained = nn.ParameterDict()
        for layer in range(arch.layers):
            for part, shape in delta_shapes(arch, rank).items():
                value = torch.zeros(shape)
                if part in {"experts.Agu", "experts.Adn"}:
                    value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
                self.trained[_key(layer, part)] = nn.Parameter(value)
        self._dense = [self._read_layer(base, layer) for layer in range(arch.layers)]
        self.embedding = torch.from_numpy(base.weight("model.embed_tokens")).to(dtype)
        self.final_norm = torch.from_numpy(base.weight("model.norm")).to(dtype)
        self._moe_layer = self._moe_layer_eager
        self._dense_layer = self._dense_layer_eager

    def to_device(self, device: torch.device) -> None:
        """Move trained and frozen tensors."""
        self.to(device)
        self._dense = [Dense(*(t.to(device) for t in layer)) for layer in self._dense]
        self.embedding, self.final_norm = self.embedding.to(device), self.final_norm.to(device)

    def compile(self) -> None:
        """Compile one layer of each kind; all layers share the code."""
        self._moe_layer = torch.compile(self._moe_layer_eager, dynamic=False)
        self._dense_layer = torch.compile(self._dense_layer_eager, dynamic=False)

    def factors(self, layer: int) -> Factors:
        """Return one layer's trained tensors."""
        return Factors(*(self.trained[_key(layer, part)] for part in delta_shapes(self.arch, 1)))

    def delta(self) -> dict[str, FloatArray]:
        """Return the trained tensors by the delta's names."""
        return {
            delta_name(layer, part): self.trained[_key(layer, part)].detach().float().cpu().numpy()
            for layer in range(self.arch.layers)
            for part in delta_shapes(self.arch, self.rank)
        }

    def forward(
        self, ids: Tensor, positions: Tensor, documents: Tensor, *, experts: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Return final hidden states [rows, length, hidden] and each layer's router logits [tokens, experts].

        Without `experts` this is the dense base and there are no logits.
        """
        rope, mask, x = self._prepare(ids, positions, documents)
        logits: list[Tensor] = []
        for layer, weights in enumerate(self._dense):
            if experts:
                x, routed = self._moe_layer(x, weights, self.factors(layer), rope, mask)
                logits.append(routed)
            else:
                x = self._dense_layer(x, weights, rope, mask)
        return rms_norm(x, self.final_norm, self.arch.rms_eps), logits

    @torch.no_grad()
    def router_inputs(self, ids: Tensor, positions: Tensor, documents: Tensor) -> list[Tensor]:
        """Return what each layer's router would read in the dense base: [tokens, hidden] a layer."""
        rope, mask, x = self._prepare(ids, positions, documents)
        seen = []
        for weights in self._dense:
            x, normed = router_input(x, weights, rope, mask, self.arch.head_dim, self.arch.rms_eps)
            seen.append(normed.reshape(-1, self.arch.hidden))
            x = x + dense_ffn(normed, weights)
        return seen

    def _prepare(
        self, ids: Tensor, positions: Tensor, documents: Tensor
    ) -> tuple[Rope, Tensor, Tensor]:
        arch, device = self.arch, ids.device
        inverse = arch.rope_theta ** (
            -torch.arange(0, arch.head_dim, 2, dtype=torch.float32, device=device) / arch.head_dim
        )
        angle = positions[..., None].float() * inverse  # [rows, length, head_dim / 2]
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        rope = Rope(angle.cos().to(self.dtype), angle.sin().to(self.dtype))
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        query, key = documents[:, :, None], documents[:, None, :]
        allowed = ((query == key) | (key == -1)) & causal  # -1 is the shared prefix
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=device)
        mask = mask.masked_fill_(~allowed, -torch.inf).unsqueeze(1)  # [rows, 1, length, length]
        return rope, mask, F.embedding(ids, self.embedding)

    def _moe_layer_eager(
        self, x: Tensor, w: Dense, f: Factors, rope: Rope, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, normed = router_input(x, w, rope, mask, self.arch.head_dim, self.arch.rms_eps)
        out, logits = expert_ffn(normed.reshape(-1, normed.shape[-1]), w, f, self.arch.top_k)
        return x + out.view_as(x), logits

    def _dense_layer_eager(self, x: Tensor, w: Dense, rope: Rope, mask: Tensor) -> Tensor:
        x, normed = router_input(x, w, rope, mask, self.arch.head_dim, self.arch.rms_eps)
        return x + dense_ffn(normed, w)

    def _read_layer(self, base: GgufBase, layer: int) -> Dense:
        def read(part: str) -> Tensor:
            return torch.from_numpy(base.weight(f"model.layers.{layer}.{part}")).to(self.dtype)

        return Dense(
            input_norm=read("input_layernorm"),
            post_norm=read("post_attention_layernorm"),
            q=read("self_attn.q_proj"),
            k=read("self_attn.k_proj"),
            v=read("self_attn.v_proj"),
            o=read("self_attn.o_proj"),
            gate_up=torch.cat([read("mlp.gate_proj"), read("mlp.up_proj")]),
            down=read("mlp.down_proj"),
        )


def _key(layer: int, part: str) -> str:
    return f"{layer}_{part.replace('.', '_')}"
