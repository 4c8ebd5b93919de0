"""R-KV redundancy in two launches; nothing of size N x N exists, and what is spared is found newest tile first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.attention_triton import compute_type

SUMMED = 64
TILE, TILE_FLOAT32 = (64, 64), (16, 32)
"""Rows and columns of a tile of cosines; float32 keys take more registers."""

FIXED = 2.0**40
"""Spared cosines are added as fixed-point integers, whose sum does not depend on the order of the programs."""


@triton.jit
def load_keys(keys, slot, n, key_slot, SIZE: tl.constexpr, PADDED: tl.constexpr):
    element = tl.arange(0, PADDED)
    inside = (slot < n)[:, None] & (element < SIZE)[None, :]
    return tl.load(keys + slot.to(tl.int64)[:, None] * key_slot + element[None, :], mask=inside, other=0.0)


@triton.jit
def total_kernel(
    keys, inverse_norm, total, n, key_slot, SIZE: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Of one head: 1 / |k_j|, and the sum over i of the cosine of keys i and j, i = j left out, both float32 `[n]`."""
    head = tl.program_id(0).to(tl.int64)
    keys += head * n * key_slot
    inverse_norm += head * n
    total += head * n
    of_all = tl.zeros((PADDED,), tl.float32)
    start = 0
    while start < n:
        slot = start + tl.arange(0, SLOTS)
        k = load_keys(keys, slot, n, key_slot, SIZE, PADDED).to(tl.float32)
        inverse = 1 / (tl.sqrt(tl.sum(k * k, 1)) + 1e-8)
        tl.store(inverse_norm + slot, inverse, mask=slot < n)
        of_all += tl.sum(k * inverse[:, None], 0)
        start += SLOTS
    start = 0
    while start < n:
        slot = start + tl.arange(0, SLOTS)
        k = load_keys(keys, slot, n, key_slot, SIZE, PADDED).to(tl.float32)
        k = k / (tl.sqrt(tl.sum(k * k, 1)) + 1e-8)[:, None]
        tl.store(total + slot, tl.sum(k * of_all[None, :], 1) - tl.sum(k * k, 1), mask=slot < n)
        start += SLOTS


@triton.jit
def spare_kernel(
    keys, inverse_norm, spared, n, key_slot, threshold,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr, FIXED: tl.constexpr
):  # fmt: skip
    """Add to spared int64 `[n]`, for each i of a tile, its cosine with the newest j more similar than threshold.

    Heads, those of all layers and rows, are on the axis of the grid that takes 2^31; the others take 65,535.
    """
    head = tl.program_id(0).to(tl.int64)
    keys += head * n * key_slot
    inverse_norm += head * n
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = load_keys(keys, row, n, key_slot, SIZE, PADDED).to(COMPUTE)
    inverse = tl.load(inverse_norm + row, mask=row < n, other=0.0)
    newest = tl.where(row < n, -1, 0)
    cosine_of_newest = tl.zeros((ROWS,), tl.float32)
    start = (tl.cdiv(n, COLUMNS) - 1) * COLUMNS
    while (start >= 0) & (tl.min(newest, 0) < 0):
        column = start + tl.arange(0, COLUMNS)
        other = load_keys(keys, column, n, key_slot, SIZE, PADDED).to(COMPUTE)
        cosine = tl.dot(k, tl.trans(other), input_precision="tf32x3")
        cosine *= inverse[:, None] * tl.load(inverse_norm + column, mask=column < n, other=0.0)[None, :]
        cosine = tl.where(row[:, None] == column[None, :], 0.0, cosine)
        # In the oldest tile, an i without such a j spares slot 0.
        similar = (cosine > threshold) & (column < n)[None, :]
        found = tl.max(tl.where(similar | (column == 0)[None, :], column[None, :], -1), 1)
        new = (newest < 0) & (found >= 0)
        at = tl.sum(tl.where(column[None, :] == found[:, None], cosine, 0.0), 1)
        cosine_of_newest = tl.where(new, at, cosine_of_newest)
        newest = tl.where(new, found, newest)
        start -= COLUMNS
    fixed = tl.floor(cosine_of_newest.to(tl.float64) * FIXED + 0.5).to(tl.int64)
    tl.atomic_add(spared + head * n + newest, fixed, mask=row < n)


@torch.library.custom_op("kvlib::redundancy", mutates_args=())
def mean_cosine_by_tiles(keys: Tensor, threshold: float | None) -> Tensor:
    """kvlib.kernels.redundancy.mean_cosine, float32 `[..., N]`."""
    assert keys.dtype in (torch.float16, torch.bfloat16, torch.float32), keys.dtype
    keys = keys.contiguous()
    *batch, N, D = keys.shape
    n_heads, padded = keys[..., 0, 0].numel(), max(16, triton.next_power_of_2(D))
    total = torch.empty(*batch, N, dtype=torch.float32, device=keys.device)
    inverse_norm = torch.empty_like(total)
    total_kernel[(n_heads,)](keys, inverse_norm, total, N, D, SIZE=D, PADDED=padded, SLOTS=SUMMED)
    if threshold is not None:
        spared = torch.zeros_like(total, dtype=torch.int64)
        compute = compute_type(keys.dtype)
        rows, columns = TILE_FLOAT32 if compute is tl.float32 else TILE
        spare_kernel[(n_heads, triton.cdiv(N, rows))](
            keys, inverse_norm, spared, N, D, threshold, SIZE=D, PADDED=padded, ROWS=rows, COLUMNS=columns,
            COMPUTE=compute, FIXED=FIXED,
        )  # fmt: skip
        total -= spared / FIXED
    return total / N


@mean_cosine_by_tiles.register_fake
def _(keys, threshold) -> Tensor:
    return torch.empty_like(keys[..., 0], dtype=torch.float32, memory_format=torch.contiguous_format)
