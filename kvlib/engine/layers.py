"""One decode step through the layers of a Llama, Qwen2 or Qwen3 model: a token per row in, its hidden state out.

The weights are the Hugging Face model's own. Matrices that read the same input are fused into one, and the model's
separate ones become slices of it, so that a step reads every weight once in four products a layer, and prefill,
which goes through the model itself, needs no second copy. In float32 on a CPU a step reads packed copies of large
ones, at twice the memory of the weights: there speed runs out first.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvlib.engine.cache import SlotCache
from kvlib.errors import ConfigError
from kvlib.kernels.append import append
from kvlib.kernels.attention import decode_attention
from kvlib.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from kvlib.policies.base import MASS

PACKED_FROM = 2**20
"""Bytes of a weight. Smaller ones stay in the CPU's cache, and a step gains nothing from packing them."""
PACKS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
"""Where packing was measured; elsewhere oneDNN's float32 products may be no faster, or missing."""


@dataclass(frozen=True)
class Linear:
    """weight `[outputs, inputs]`, bias `[outputs]` or None; packed: the weight as oneDNN reads it fastest, or None."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@dataclass(frozen=True)
class Layer:
    """qkv yields query, key and value heads in this order; gate_up yields gate and up. q_norm, k_norm: Qwen3 only."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    products: ClassVar = ("qkv", "output", "gate_up", "down")


def fuse(*linears: nn.Linear) -> Linear:
    """The linears of one input as one, sharing storage with them. A second call finds what the first one made.

    A packed copy is of the weights as they are now; it is kept on the first linear, for all decoders of the model.
    """
    if len({linear.bias is None for linear in linears}) > 1:
        raise ConfigError("the model's projections differ in whether they have a bias, which kvlib does not fuse")
    bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    weight = _joined([linear.weight for linear in linears])
    return Linear(weight, bias, _packed(weight, linears))


def _packed(weight: Tensor, linears: Sequence[nn.Linear]) -> Tensor | None:
    """A copy in oneDNN's blocked layout, where it pays: products of a few rows then take half the time."""
    if not PACKS or weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.nbytes < PACKED_FROM:
        return None
    made_of = weight.data_ptr(), weight.shape, [linear.weight._version for linear in linears]
    kept = getattr(linears[0], "packed", None)
    if kept is None or kept[0] != made_of:
        kept = linears[0].packed = made_of, torch.ops.mkldnn._reorder_linear_weight(weight)
    return kept[1]


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """The parameters as slices, along their first dimension, of the tensor returned."""
    first, starts = parts[0], [0]
    for part in parts:
        starts.append(starts[-1] + part.numel())
    shared = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + start
        and part.is_contiguous()
        for part, start in zip(parts, starts, strict=False)
    )
    if not shared:
        joined = torch.cat([part.detach() for part in parts])
        for part, own in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = own
    size = (sum(map(len, parts)), *first.shape[1:])
    return first.detach().as_strided(size, first.stride(), first.storage_offset())


class DecodeLayers:
    """The layers of a model whose attention and feed-forward are those of Llama (RMSNorm, RoPE, SiLU gate).

    Raises ConfigError for a model that is built in another way.
    """

    def __init__(self, model: nn.Module):
        base, config = model.base_model, model.config
        if config.hidden_act != "silu":
            raise ConfigError(f"the model's feed-forward uses {config.hidden_act}; kvlib decodes models that use silu")
        if base.rotary_emb.rope_type in ("dynamic", "longrope"):
            raise ConfigError(
                f"the model's RoPE is of type {base.rotary_emb.rope_type}, whose frequencies change with the length; "
                "kvlib decodes models whose keys keep their rotation"
            )
        self.embedding, self.rotary, self.norm = base.embed_tokens, base.rotary_emb, base.norm
        self.n_query_heads = config.num_attention_heads
        self.scaling = base.layers[0].self_attn.scaling
        self.eps = config.rms_norm_eps
        self.layers = [self._layer(layer) for layer in base.layers]

    @staticmethod
    def _layer(layer: nn.Module) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return Layer(
            attention_norm=layer.input_layernorm.weight.detach(),
            qkv=fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=None if norms[0] is None else norms[0].weight.detach(),
            k_norm=None if norms[1] is None else norms[1].weight.detach(),
            output=fuse(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=fuse(mlp.gate_proj, mlp.up_proj),
            down=fuse(mlp.down_proj),
        )

    def __call__(self, tokens: Tensor, positions: Tensor, cache: SlotCache, n_max: int) -> Tensor:
        """Hidden states `[B, d]` (after the final norm) of tokens `[B]` at positions `[B]`.

        Keys, values and positions go to each row's next free slot, `cache.lengths`, which the caller advances; n_max
        bounds the slots in use, these included.
        """
        slots, lengths = cache.lengths, cache.lengths + 1
        cache.claim(positions)
        x = self.embedding(tokens)
        cos, sin = (table[:, 0] for table in self.rotary(x, positions[:, None]))
        masses, rings = cache.state.get(MASS), cache.ring if cache.shape.n_queries else None
        y = None
        for i, (layer, keys, values) in enumerate(zip(self.layers, cache.layer_keys, cache.layer_values, strict=True)):
            if y is None:
                normed = rms_norm(x, layer.attention_norm, self.eps)
            else:
                normed, x = add_rms_norm(y, x, layer.attention_norm, self.eps)
            query = append(
                layer.qkv(normed),
                cos,
                sin,
                keys,
                values,
                slots,
                positions,
                n_query_heads=self.n_query_heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=self.eps,
                ring=None if rings is None else rings.select(0, i),
            )
            mass = None if masses is None else masses.select(0, i)
            attended = decode_attention(query, keys, values, lengths, self.scaling, n_max, mass)
            normed, x = add_rms_norm(layer.output(attended.flatten(1)), x, layer.mlp_norm, self.eps)
            y = layer.down(silu_mul(layer.gate_up(normed)))
        return add_rms_norm(y, x, self.norm.weight, self.eps)[0]
