"""Attention of one new query per row over the live slots of a static cache."""

import torch
from torch import Tensor
from torch.nn import functional as F


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, live: Tensor, scaling: float) -> Tensor:
    """Attend over live slots; query heads that share a KV head are handled together, keys are never repeated.

    query `[B, HQ, D]`, keys and values `[B, H, N, D]`, live `[B, N]` bool -> `[B, HQ, D]`.
    Dead slots weigh exactly 0, whatever finite values they hold.
    """
    B, HQ, D = query.shape
    H, N = keys.shape[1], keys.shape[2]
    grouped = query.view(B, H, HQ // H, D)
    mask = live[:, None, None, :].expand(B, 1, HQ // H, N)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(B, HQ, D)


def decode_attention_with_mass(
    query: Tensor, keys: Tensor, values: Tensor, live: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As decode_attention, and the attention each slot received, summed over the group: `[B, H, N]`."""
    B, HQ, D = query.shape
    H = keys.shape[1]
    grouped = query.view(B, H, HQ // H, D)
    probabilities = attention_probabilities(grouped, keys, live[:, None, None, :], scaling)
    return (probabilities @ values).reshape(B, HQ, D), probabilities.sum(2)


def attention_probabilities(query: Tensor, keys: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """softmax over the slots of scaling * q.k, in at least float32: `[..., Q, D]`, `[..., N, D]` -> `[..., Q, N]`."""
    logits = (query @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).to(keys.dtype)
