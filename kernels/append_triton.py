"""Head norm, RoPE and the cache write of one new token per row, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def append_kernel(
    qkv, cos, sin, keys, values, slots, positions, q_norm, k_norm, ring, query, eps, keys_b, keys_h, keys_n,
    values_b, values_h, values_n, ring_b, ring_h, ring_w, n_ring, HQ: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, NORM: tl.constexpr, RING: tl.constexpr
):  # fmt: skip
    """One program per head of qkv and row: heads 0 .. HQ - 1 are queries, then H keys, then H values."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kind = keys.dtype.element_ty
    half = tl.arange(0, D // 2)
    source = qkv + (row * (HQ + 2 * H) + head) * D + half
    a, b = tl.load(source).to(tl.float32), tl.load(source + D // 2).to(tl.float32)
    slot = tl.load(slots + row)
    if head >= HQ + H:
        target = values + row * values_b + (head - HQ - H).to(tl.int64) * values_h + slot * values_n + half
        tl.store(target, a.to(kind))
        tl.store(target + D // 2, b.to(kind))
    else:
        if NORM:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            weight = (q_norm if head < HQ else k_norm) + half
            # As transformers: rounded to the model's type before the weight, and after it.
            a = (a * scale).to(kind).to(tl.float32) * tl.load(weight).to(tl.float32)
            b = (b * scale).to(kind).to(tl.float32) * tl.load(weight + D // 2).to(tl.float32)
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
        angle = row * D + half
        new_a = a * tl.load(cos + angle).to(tl.float32) - b * tl.load(sin + angle).to(tl.float32)
        new_b = b * tl.load(cos + angle + D // 2).to(tl.float32) + a * tl.load(sin + angle + D // 2).to(tl.float32)
        if head < HQ:
            target = query + (row * HQ + head) * D + half
            if RING:
                copy = ring + row * ring_b + head.to(tl.int64) * ring_h + half
                copy += (tl.load(positions + row) % n_ring) * ring_w
                tl.store(copy, new_a.to(kind))
                tl.store(copy + D // 2, new_b.to(kind))
        else:
            target = keys + row * keys_b + (head - HQ).to(tl.int64) * keys_h + slot * keys_n + half
        tl.store(target, new_a.to(kind))
        tl.store(target + D // 2, new_b.to(kind))


@torch.library.custom_op("kvlib::append", mutates_args=("keys", "values", "ring"))
def append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    n_query_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    ring: Tensor | None,
) -> Tensor:
    """As `kvlib.kernels.append.append`; D a power of two >= 16."""
    B, H, _, D = keys.shape
    HQ = n_query_heads
    assert qkv.shape == (B, (HQ + 2 * H) * D) and qkv.is_contiguous(), f"qkv: [B, (HQ + 2H) D] contiguous, {qkv.shape}"
    assert values.shape == keys.shape and keys.dtype == values.dtype == qkv.dtype, (qkv.dtype, keys.shape, values.shape)
    assert D >= 16 and D & (D - 1) == 0, f"head_dim {D} is no power of two >= 16"
    assert keys.stride(3) == values.stride(3) == 1, "keys and values must be contiguous in the last axis"
    assert cos.shape == sin.shape == (B, D) and cos.is_contiguous() and sin.is_contiguous(), (
        "cos, sin: [B, D] contiguous"
    )
    for index in (slots, positions):
        assert index.shape == (B,) and index.dtype == torch.int64 and index.is_contiguous(), (
            "slots, positions: [B] int64"
        )
    assert (q_norm is None) == (k_norm is None), "q_norm and k_norm: both or neither"
    if q_norm is not None:
        assert q_norm.shape == k_norm.shape == (D,) and q_norm.is_contiguous() and k_norm.is_contiguous(), "norms: [D]"
    if ring is not None:
        assert ring.shape[:2] == (B, HQ) and ring.shape[3] == D and ring.stride(3) == 1, "ring: [B, HQ, W, D]"
        assert ring.dtype == qkv.dtype, (ring.dtype, qkv.dtype)
    query = qkv.new_empty(B, HQ, D)
    append_kernel[HQ + 2 * H, B](
        qkv, cos, sin, keys, values, slots, positions, qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm, query if ring is None else ring, query, eps, *keys.stride()[:3],
        *values.stride()[:3], *((0, 0, 0) if ring is None else ring.stride()[:3]),
        1 if ring is None else ring.shape[2], HQ=HQ, H=H, D=D, NORM=q_norm is not None, RING=ring is not None,
        num_warps=1,
    )  # fmt: skip
    return query


@append.register_fake
def _(qkv, cos, sin, keys, values, slots, positions, n_query_heads, q_norm, k_norm, eps, ring):
    return qkv.new_empty(keys.shape[0], n_query_heads, keys.shape[3])
