"""The attention function of transformers models, and the two kinds of step it serves: prefill, and observed traces.

A step is passed to the model twice, as `past_key_values` (transformers hands it every layer's new keys and
values) and as `kv_step` (unknown keyword arguments reach the attention function). No hook, no patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kvlib.engine.cache import SlotCache
from kvlib.kernels.attention import attention_probabilities
from kvlib.policies.base import MASS

IMPLEMENTATION = "kvlib"


def slot_attention(module, query, key, value, attention_mask, *, scaling, kv_step=None, **_):
    """transformers' attention interface: query `[B, HQ, Q, D]` -> output `[B, Q, HQ, D]`, no weights."""
    if kv_step is None:
        raise RuntimeError("kvlib is decoding with this model at this moment; call it before or afterwards")
    return kv_step.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)


@contextmanager
def through_kvlib(model: nn.Module) -> Iterator[None]:
    """The model evaluates with kvlib's attention inside, whatever it was loaded with; afterwards it is as before."""
    config, training = model.base_model.config, [module for module in model.modules() if module.training]
    before = config._attn_implementation
    try:
        config._attn_implementation = IMPLEMENTATION
        for module in training:
            module.training = False
        yield
    finally:
        config._attn_implementation = before
        for module in training:
            module.training = True


def causal_mask(n: int, device: torch.device | str) -> Tensor:
    """`[n, n]` bool, True where the query (row) may see the key (column)."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query `[B, HQ, T, D]`, key and value `[B, H, T, D]` -> `[B, T, HQ, D]`."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


class PrefillStep(Cache):
    """The prompt of one row, unpadded, from position 0: fills slots 0 .. P-1 of that row."""

    def __init__(self, cache: SlotCache, row: int, n_prompt: int):
        super().__init__(layers=[])
        self.cache, self.row, self.n_prompt = cache, row, n_prompt
        cache.positions[:, row] = -1
        cache.positions[:, row, :, :n_prompt] = torch.arange(n_prompt, dtype=torch.int32, device=cache.keys.device)
        for state in cache.state.values():
            state[:, row] = 0
        cache.lengths[row] = n_prompt

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.cache.keys[layer_idx, self.row, :, : self.n_prompt] = key[0]
        self.cache.values[layer_idx, self.row, :, : self.n_prompt] = value[0]
        return key, value

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        cache, P, W = self.cache, self.n_prompt, self.cache.shape.n_queries
        if W:
            recent = torch.arange(max(0, P - W), P, device=query.device)
            cache.ring[layer_idx, self.row][:, recent % W] = query[0][:, recent]
        if MASS in cache.state:
            H = key.shape[1]
            wide = torch.promote_types(query.dtype, torch.float32)
            grouped, keys = query[0].unflatten(0, (H, -1)).to(wide), key[0, :, None].to(wide)
            probabilities = attention_probabilities(grouped, keys, causal_mask(P, query.device), scaling)
            cache.state[MASS][layer_idx, self.row, :, :P] = probabilities.sum((1, 2))
        return causal_attention(query, key, value, scaling)


Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""Sees a layer's index, queries `[HQ, T, D]`, keys and values `[H, T, D]` (after RoPE), and the scaling of q.k."""


class ObservedStep(Cache):
    """All tokens of one trace at once, nothing stored: shows every layer's queries, keys and values to an observer."""

    def __init__(self, observer: Observer):
        super().__init__(layers=[])
        self.observer = observer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.observer(layer_idx, query[0], key[0], value[0], scaling)
        return causal_attention(query, key, value, scaling)


@torch.no_grad()
def observe_trace(model: nn.Module, ids: Sequence[int], observer: Observer) -> Tensor:
    """Run the model over a trace; its hidden states `[T, d]` (after the final norm)."""
    ids = torch.tensor([ids], device=next(model.parameters()).device)
    step = ObservedStep(observer)
    with through_kvlib(model):
        return model.base_model(input_ids=ids, past_key_values=step, use_cache=True, kv_step=step).last_hidden_state[0]
