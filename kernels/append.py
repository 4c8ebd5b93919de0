"""One new token per row: head norm and RoPE, its key and value into the cache, its query out."""

import torch
from torch import Tensor
from torch.nn import functional as F


def append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    n_query_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    ring: Tensor | None = None,
) -> Tensor:
    """Rotate the new query and key, write key and value to row b's slot; the rotated query `[B, HQ, D]`.

    qkv `[B, (HQ + 2H) D]` contiguous, bias included. cos, sin `[B, D]` in its dtype or float32, with the halves
    repeated as in transformers (`rotate_half`). keys, values `[B, H, N, D]`: one layer of the cache, written at
    slots `[B]` int64. q_norm, k_norm `[D]`: Qwen3's RMSNorm of each head before the rotation, both or neither.
    ring `[B, HQ, W, D]`, if given: the rotated query is stored there at positions `[B]` mod W.
    """
    if qkv.device.type != "cpu":
        from kvlib.kernels.append_triton import append as kernel

        return kernel(qkv, cos, sin, keys, values, slots, positions, n_query_heads, q_norm, k_norm, eps, ring)
    B, H, _, D = keys.shape
    HQ = n_query_heads
    rows = torch.arange(B, device=qkv.device)
    heads = qkv.view(B, HQ + 2 * H, D)
    query, key = rotated_heads(heads, cos, sin, HQ, H, q_norm, k_norm, eps).split((HQ, H), 1)
    keys[rows, :, slots] = key
    values[rows, :, slots] = heads[:, HQ + H :]
    if ring is not None:
        ring[rows, :, positions % ring.shape[2]] = query
    return query


def rotated_heads(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_query_heads: int,
    n_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Query and key heads `[T, HQ + H, D]`, normed and rotated, of heads `[T, HQ + 2H, D]`; the rest as in `append`."""
    D, last = heads.shape[-1], n_query_heads + n_kv_heads
    rotated = heads[:, :last]
    if q_norm is not None:
        query, key = heads[:, :n_query_heads], heads[:, n_query_heads:last]
        rotated = torch.cat((F.rms_norm(query, (D,), q_norm, eps), F.rms_norm(key, (D,), k_norm, eps)), 1)
    half = torch.cat((-rotated[..., D // 2 :], rotated[..., : D // 2]), -1)
    return (rotated * cos[:, None] + half * sin[:, None]).to(heads.dtype)
