"""Split-KV decode attention (flash-decoding) over ragged live slots: one launch over the slots, one to merge."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # slots per tile of the split kernel
MASS_BLOCK = 512  # slots per program that adds mass
MAX_SPLITS = 64
PROGRAMS = 256  # what the split kernel's grid aims at: on an H100, 4 splits of 20 rows read 7 % faster than 16
STAGES = 3  # tiles of keys and values on their way at once
SPLIT_WARPS = 2
NONE = tl.constexpr(-1.0e30)  # a logit that weighs nothing; finite, because exp(-inf + inf) is NaN


@triton.jit
def split_kernel(
    query, keys, values, lengths, partial, lse, logits, scaling, keys_b, keys_h, keys_n, values_b, values_h,
    values_n, n_slots, n_heads, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """One split of one KV head: attention over its live slots alone, and its log2-sum-exp2.

    scaling includes log2(e). query `[B, HQ, D]`; partial float32 `[B, HQ, SPLITS, D]`, lse `[B, HQ, SPLITS]`,
    logits `[B, HQ, N]` (base 2, live slots only, if MASS).
    """
    split, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * chunk
    last = tl.minimum(first + chunk, length)

    member, dim, lane = tl.arange(0, GROUP), tl.arange(0, D), tl.arange(0, BLOCK)
    real = member < G
    query_head = (row * n_heads + head) * G + member
    q = tl.load(query + query_head[:, None] * D + dim[None, :], mask=real[:, None], other=0.0).to(COMPUTE)
    own_keys = keys + row * keys_b + head * keys_h + dim[None, :]
    own_values = values + row * values_b + head * values_h + dim[None, :]

    top = tl.full([GROUP], NONE, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, D], tl.float32)
    for start in range(first, last, BLOCK):
        slot = start + lane
        live = slot < last
        k = tl.load(own_keys + slot[:, None] * keys_n, mask=live[:, None], other=0.0)
        x = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision="ieee") * scaling
        x = tl.where(live[None, :], x, NONE)
        if MASS:
            tl.store(logits + query_head[:, None] * n_slots + slot[None, :], x, mask=real[:, None] & live[None, :])
        new_top = tl.maximum(top, tl.max(x, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(x - new_top[:, None])
        v = tl.load(own_values + slot[:, None] * values_n, mask=live[:, None], other=0.0)
        acc = tl.dot(p.to(COMPUTE), v.to(COMPUTE), acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top

    seen = total > 0
    place = query_head * SPLITS + split
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    tl.store(partial + place[:, None] * D + dim[None, :], acc, mask=real[:, None])
    tl.store(lse + place, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), NONE), mask=real)


@triton.jit
def merge_kernel(
    partial, lse, logits, lengths, out, mass, mass_b, mass_h, n_slots, n_heads, G: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """Programs 0 .. G - 1 of a KV head merge one query head's splits; the others add one block of slots' mass."""
    part, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_head = (row * n_heads + head) * G
    split = tl.arange(0, SPLITS)
    if part < G:
        place = (first_head + part) * SPLITS + split
        dim = tl.arange(0, D)
        x = tl.load(lse + place)
        weight = tl.exp2(x - tl.max(x, 0))
        weight = weight / tl.sum(weight, 0)
        merged = tl.sum(tl.load(partial + place[:, None] * D + dim[None, :]) * weight[:, None], 0)
        tl.store(out + (first_head + part) * D + dim, merged.to(out.dtype.element_ty))
    elif MASS:
        length = tl.load(lengths + row).to(tl.int32)
        slot = (part - G) * BLOCK + tl.arange(0, BLOCK)
        live = slot < length
        received = tl.zeros([BLOCK], tl.float32)
        for member in tl.static_range(G):
            x = tl.load(lse + (first_head + member) * SPLITS + split)
            top = tl.max(x, 0)
            whole = top + tl.log2(tl.sum(tl.exp2(x - top), 0))
            logit = tl.load(logits + (first_head + member) * n_slots + slot, mask=live, other=NONE)
            received += tl.exp2(logit - whole)
        target = mass + row * mass_b + head * mass_h + slot
        tl.store(target, tl.load(target, mask=live, other=0.0) + received, mask=live)


def n_splits(n_rows: int, n_heads: int, n_slots: int, programs: int = PROGRAMS) -> int:
    """A power of two, from shapes alone: enough programs to fill a card, no split shorter than a tile."""
    wanted = triton.next_power_of_2(triton.cdiv(programs, n_rows * n_heads))
    tiles = triton.cdiv(n_slots, BLOCK)
    return min(wanted, 1 << (tiles.bit_length() - 1), MAX_SPLITS)


@torch.library.custom_op("kvlib::decode_attention", mutates_args=("mass",))
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    mass: Tensor | None,
    programs: int = PROGRAMS,
    stages: int = STAGES,
) -> Tensor:
    """As `kvlib.kernels.attention.decode_attention`; float16, bfloat16 or float32, D a power of two >= 16.

    programs, stages: for the bench, which varies them.
    """
    B, HQ, D = query.shape
    H, N = keys.shape[1:3]
    G = HQ // H
    assert keys.shape == values.shape == (B, H, N, D) and HQ == H * G, (query.shape, keys.shape, values.shape)
    assert D >= 16 and D & (D - 1) == 0, f"head_dim {D} is no power of two >= 16"
    assert query.dtype in (torch.float16, torch.bfloat16, torch.float32), query.dtype
    assert keys.dtype == values.dtype == query.dtype, (query.dtype, keys.dtype, values.dtype)
    assert keys.stride(3) == values.stride(3) == 1, "keys and values must be contiguous in the last axis"
    assert N * max(keys.stride(2), values.stride(2)) < 2**31, "one head of one row must be within 2^31 elements"
    assert lengths.shape == (B,) and lengths.dtype == torch.int64 and lengths.is_contiguous(), "lengths: [B] int64"
    with_mass = mass is not None
    if with_mass:
        assert mass.shape == (B, H, N) and mass.dtype == torch.float32 and mass.stride(2) == 1, (
            "mass: [B, H, N] float32"
        )
    query = query.contiguous()
    splits = n_splits(B, H, N, programs)
    wide = query.dtype == torch.float32
    scratch = {"dtype": torch.float32, "device": query.device}
    partial, lse = torch.empty(B, HQ, splits, D, **scratch), torch.empty(B, HQ, splits, **scratch)
    logits = torch.empty(B, HQ, N, **scratch) if with_mass else lse
    out = torch.empty_like(query)
    split_kernel[splits, H, B](
        query, keys, values, lengths, partial, lse, logits, scaling * math.log2(math.e), *keys.stride()[:3],
        *values.stride()[:3], N, H, G=G, GROUP=max(16, triton.next_power_of_2(G)), D=D, SPLITS=splits,
        BLOCK=BLOCK, COMPUTE=compute_type(query.dtype), MASS=with_mass, num_warps=SPLIT_WARPS,
        num_stages=1 if wide else stages,
    )  # fmt: skip
    merge_kernel[G + (triton.cdiv(N, MASS_BLOCK) if with_mass else 0), H, B](
        partial, lse, logits, lengths, out, mass if with_mass else lse,
        *(mass.stride()[:2] if with_mass else (0, 0)), N, H, G=G, D=D, SPLITS=splits, BLOCK=MASS_BLOCK,
        MASS=with_mass, num_warps=4,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What products are taken in: the tensors' own type; float32 in the interpreter, whose low ones differ."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
