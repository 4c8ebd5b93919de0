"""Prefill and decode steps of a plain Llama, Qwen2 or Qwen3 model: a token per row in, hidden states and logits out.

The weights are the Hugging Face model's own. Matrices that read the same input are fused into one, and the model's
separate ones become slices of it, so that a step reads every weight once in four products a layer. In float32 on a
CPU both read packed copies of large ones instead, and the plain ones, if mapped from a file, take no memory.
`FastModel.close` undoes both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.activations import ACT2FN

from kvlib.engine.attention import CHANGING
from kvlib.engine.cache import SlotCache, cache_shape
from kvlib.engine.linear import Int8Linear, Int8Part, Linear, adjacent, alone, fuse
from kvlib.kernels.append import append, rotated_heads
from kvlib.kernels.attention import decode_attention
from kvlib.kernels.gated import gated
from kvlib.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from kvlib.policies.base import MASS, Policy

PLAIN = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RECORDS = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers leaves on a model once asked for its hidden states: they only read."""


@dataclass(frozen=True)
class Layer:
    """qkv yields query, key and value heads in this order; gate_up yields gate and up. q_norm, k_norm: Qwen3 only."""

    attention_norm: Tensor
    qkv: Linear | Int8Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear | Int8Linear
    mlp_norm: Tensor
    gate_up: Linear | Int8Linear
    down: Linear | Int8Linear

    products: ClassVar = ("qkv", "output", "gate_up", "down")

    @classmethod
    def of(cls, layer: nn.Module, fuse: Callable[..., Linear | Int8Linear] = fuse) -> "Layer":
        """What the fast step reads of a decoder layer of transformers. fuse: of the linears of one input, one."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return cls(
            attention_norm=layer.input_layernorm.weight.detach(),
            qkv=fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=None if norms[0] is None else norms[0].weight.detach(),
            k_norm=None if norms[1] is None else norms[1].weight.detach(),
            output=fuse(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=fuse(mlp.gate_proj, mlp.up_proj),
            down=fuse(mlp.down_proj),
        )

    def activated(self, x: Tensor) -> Tensor:
        """silu(gate) * up `[T, I]` of `[T, d]`."""
        product = self.gate_up
        if type(product) is Linear and product.bias is None and not product.weight.is_mkldnn:
            return gated(x, product.weight)
        return silu_mul(product(x))


def why_not_fast(model: nn.Module) -> str | None:
    """What keeps a model from the fast step, which reads weights instead of calling modules; None for a plain model."""
    if type(model) not in PLAIN:
        return f"the model is a {type(model).__name__}"
    base, config = model.base_model, model.config
    if base.rotary_emb.rope_type in ("dynamic", "longrope"):
        return f"its RoPE is of type {base.rotary_emb.rope_type}, whose frequencies change with the length"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "some of its layers have a sliding window"
    numbers = [layer.self_attn.layer_idx for layer in base.layers]
    if numbers != list(range(config.num_hidden_layers)):
        return f"its layers are numbered {numbers}, and its config says {config.num_hidden_layers}"
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have a hook"
    own = (nn.Linear, Int8Linear, Int8Part, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"]))
    for name, module in model.named_modules():
        if getattr(module, "variance_epsilon", config.rms_norm_eps) != config.rms_norm_eps:
            return f"its module {name} has an epsilon of its own"
        if type(module) not in own and type(module).__module__ != type(model).__module__:
            return f"its module {name} is a {type(module).__name__}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(getattr(hook, "__module__", "") != RECORDS for hook in hooks):
            return f"its module {name or type(module).__name__} has a hook or a forward of its own"
    first = next(model.parameters())
    for name, part in model.named_parameters():
        if type(part) is not nn.Parameter or type(part.data) is not Tensor or part.dtype not in DTYPES:
            return f"its weight {name} is not a plain tensor of floating-point numbers"
        if (part.device, part.dtype) != (first.device, first.dtype):
            return f"its weights differ in device or dtype ({name}: {part.device}, {part.dtype})"
    for attention, mlp in ((layer.self_attn, layer.mlp) for layer in base.layers):
        if attention.scaling != base.layers[0].self_attn.scaling:
            return "its layers scale attention differently"
        for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if isinstance(linears[0], Int8Part):
                continue
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if len(biases) not in (0, len(linears)):
                return "its projections differ in whether they have a bias"
            for parts in ([linear.weight for linear in linears], biases):
                if parts and not adjacent(parts) and not all(map(alone, parts)):
                    return "its weights share a storage, of which a part cannot be moved"
    return None


class FastModel:
    """A plain model (see `why_not_fast`) beside the cache of a policy: n_rows rows of n_slots slots.

    cache: SlotCache of the layers that are evicted, here all. scaling: of q.k. inv_freq `[D / 2]`: RoPE's, radians
    per position.
    """

    name: ClassVar = "fast"

    def __init__(self, model: nn.Module, policy: Policy, n_rows: int, n_slots: int):
        base, config = model.base_model, model.config
        self.model, self.base = model, base
        shape = cache_shape(
            policy,
            n_rows,
            n_slots,
            n_layers=config.num_hidden_layers,
            n_kv_heads=config.num_key_value_heads,
            n_query_heads=config.num_attention_heads,
            head_dim=base.layers[0].self_attn.head_dim,
        )
        self.cache = SlotCache(shape, model.dtype, model.device)
        self.vocab_size = model.get_output_embeddings().out_features
        self.scaling = base.layers[0].self_attn.scaling
        self.inv_freq = base.rotary_emb.inv_freq
        self.n_query_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        parts = [part for linear in linears for part in linear.parameters()]
        with CHANGING:
            self.alone = list(filter(alone, parts))
            self.unpacked = [one for one in linears if "packed" not in vars(one)]
            try:
                self.layers = [Layer.of(layer) for layer in base.layers]
                self.head = fuse(model.get_output_embeddings())
                torch.cuda.empty_cache()  # the matrices that were fused; nothing without CUDA
            except BaseException:
                self.close()
                raise

    def prefill(self, row: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read one unpadded prompt `[P]` into `row`: hidden states `[P, d]`, as in `step`, and last logits `[V]`."""
        cache, n_kv_heads = self.cache, self.cache.shape.n_kv_heads
        cache.begin(row, len(ids))
        x = self.base.embed_tokens(ids)
        cos, sin = (table[0] for table in self.base.rotary_emb(x, torch.arange(len(ids), device=ids.device)[None]))

        def attend(i: int, layer: Layer, qkv: Tensor) -> Tensor:
            heads = qkv.unflatten(-1, (self.n_query_heads + 2 * n_kv_heads, -1))
            rotated = rotated_heads(
                heads, cos, sin, self.n_query_heads, n_kv_heads, layer.q_norm, layer.k_norm, self.eps
            )
            rotated, value = rotated.transpose(0, 1), heads[:, -n_kv_heads:].transpose(0, 1)
            query, key = rotated.split((self.n_query_heads, n_kv_heads))
            cache.store_prompt(row, i, query, key, value, self.scaling)
            whole = query[None], key[None], value[None]
            out = F.scaled_dot_product_attention(*whole, is_causal=True, scale=self.scaling, enable_gqa=True)
            return out[0].transpose(0, 1)

        hidden = self._through_layers(x, attend)
        return hidden, self.head(hidden[-1:])[0]

    def step(self, tokens: Tensor, positions: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, d]` (after the final norm) and logits `[B, V]` of tokens `[B]` at positions `[B]`.

        Keys, values and positions go to each row's next free slot, `cache.lengths`, which the caller advances; n_max
        bounds the slots in use, these included.
        """
        cache = self.cache
        slots, lengths = cache.lengths, cache.lengths + 1
        cache.claim(positions)
        x = self.base.embed_tokens(tokens)
        cos, sin = (table[:, 0] for table in self.base.rotary_emb(x, positions[:, None]))
        masses, rings = cache.state.get(MASS), cache.ring if cache.shape.n_queries else None

        def attend(i: int, layer: Layer, qkv: Tensor) -> Tensor:
            keys, values = cache.layer_keys[i], cache.layer_values[i]
            query = append(
                qkv,
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
            return decode_attention(query, keys, values, lengths, self.scaling, n_max, mass)

        hidden = self._through_layers(x, attend)
        return hidden, self.head(hidden)

    def _through_layers(self, x: Tensor, attend: Callable[[int, Layer, Tensor], Tensor]) -> Tensor:
        """Hidden states `[T, d]` (after the final norm) of embedded tokens `[T, d]`.

        attend(i, layer, qkv `[T, (HQ + 2H) D]`): the attention of layer i `[T, HQ, D]`.
        """
        y = None
        for i, layer in enumerate(self.layers):
            if y is None:
                normed = rms_norm(x, layer.attention_norm, self.eps)
            else:
                normed, x = add_rms_norm(y, x, layer.attention_norm, self.eps)
            attended = attend(i, layer, layer.qkv(normed))
            normed, x = add_rms_norm(layer.output(attended.flatten(1)), x, layer.mlp_norm, self.eps)
            y = layer.down(layer.activated(normed))
        return add_rms_norm(y, x, self.base.norm.weight, self.eps)[0]

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind of layer."""
        return {"full_attention": self.cache.nbytes()}

    def close(self) -> None:
        """Leave the model as it was before; a step must not follow."""
        self.layers, self.head = [], None
        with CHANGING, torch.inference_mode(False), torch.no_grad():
            for linear in self.unpacked:
                vars(linear).pop("packed", None)
            for part in self.alone:
                if not alone(part):
                    part.data = part.data.clone()
