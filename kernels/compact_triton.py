"""Compaction in three launches: the plan, keys and values of all layers, what is kept per slot."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAN_SLOTS = 1024
MOVE_SLOTS = 32
MOVERS = 4
"""Programs that share the moves of one head; each loops, because how many there are only the device knows."""


@triton.jit
def plan_kernel(
    keep, n_keep, source, target, n_moves, n, capacity, keep_layer, keep_row, keep_head, SLOTS: tl.constexpr
):  # fmt: skip
    """The pairs of one head: source and target int32 `[L or 1, R, H or 1, capacity]`, n_moves int32 of each."""
    layer, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pairs = (layer.to(tl.int64) * tl.num_programs(1) + row) * tl.num_programs(2) + head
    mask = keep + layer.to(tl.int64) * keep_layer + row.to(tl.int64) * keep_row + head.to(tl.int64) * keep_head
    stay = tl.load(n_keep + row)
    n_holes, n_movers, start = 0, 0, 0
    while start < n:
        slot = start + tl.arange(0, SLOTS)
        held = slot < n
        kept = tl.load(mask + slot, mask=held, other=0) != 0
        hole = held & (slot < stay) & (kept == 0)
        mover = held & (slot >= stay) & kept
        hole_rank = n_holes + tl.cumsum(hole.to(tl.int32)) - 1
        mover_rank = n_movers + tl.cumsum(mover.to(tl.int32)) - 1
        # No write outside, even if a mask breaks its promise of n_keep survivors.
        tl.store(target + pairs * capacity + hole_rank, slot, mask=hole & (hole_rank < capacity))
        tl.store(source + pairs * capacity + mover_rank, slot, mask=mover & (mover_rank < capacity))
        n_holes += tl.sum(hole.to(tl.int32))
        n_movers += tl.sum(mover.to(tl.int32))
        start += SLOTS
    tl.store(n_moves + pairs, tl.minimum(tl.minimum(n_holes, n_movers), capacity))


@triton.jit
def copy_slots(base, source, target, live, stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """base[target] = base[source]: slots `stride` apart, of SIZE elements."""
    element = tl.arange(0, PADDED)
    inside = live[:, None] & (element < SIZE)[None, :]
    moved = tl.load(base + source[:, None] * stride + element[None, :], mask=inside)
    tl.store(base + target[:, None] * stride + element[None, :], moved, mask=inside)


@triton.jit
def move_kernel(
    a, b, rows, source, target, n_moves, n_heads, capacity, pair_layer, pair_row, pair_head,
    a_layer, a_row, a_head, a_slot, b_layer, b_row, b_head, b_slot,
    SIZE: tl.constexpr, PADDED: tl.constexpr, TWO: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """A share of the moves of one row, layer and head, in tensor a and, if TWO, in b."""
    i, layer, head = tl.program_id(1), tl.program_id(2) // n_heads, tl.program_id(2) % n_heads
    pairs = layer.to(tl.int64) * pair_layer + i.to(tl.int64) * pair_row + head.to(tl.int64) * pair_head
    row = tl.load(rows + i)
    a += layer.to(tl.int64) * a_layer + row * a_row + head.to(tl.int64) * a_head
    b += layer.to(tl.int64) * b_layer + row * b_row + head.to(tl.int64) * b_head
    n = tl.load(n_moves + pairs)
    start = tl.program_id(0) * SLOTS
    while start < n:
        rank = start + tl.arange(0, SLOTS)
        live = rank < n
        src = tl.load(source + pairs * capacity + rank, mask=live, other=0).to(tl.int64)
        dst = tl.load(target + pairs * capacity + rank, mask=live, other=0).to(tl.int64)
        copy_slots(a, src, dst, live, a_slot, SIZE, PADDED)
        if TWO:
            copy_slots(b, src, dst, live, b_slot, SIZE, PADDED)
        start += tl.num_programs(0) * SLOTS


def _move(pair: Sequence[Tensor], rows: Tensor, source: Tensor, target: Tensor, n_moves: Tensor) -> None:
    """One launch for one or two tensors of the same shape."""
    a, b = pair[0], pair[-1]
    (L, _, H), size = a.shape[:3], a[0, 0, 0, 0].numel()
    shared = [1 if extent > 1 else 0 for extent in n_moves.shape]
    move_kernel[(MOVERS, rows.numel(), L * H)](
        a, b, rows, source, target, n_moves, H, source.shape[-1],
        *(stride * own for stride, own in zip(n_moves.stride(), shared, strict=True)), *a.stride()[:4], *b.stride()[:4],
        SIZE=size, PADDED=triton.next_power_of_2(size), TWO=len(pair) == 2, SLOTS=MOVE_SLOTS,
    )  # fmt: skip


@torch.library.custom_op("kvlib::compact", mutates_args=("tensors",))
def compact_slots(tensors: list[Tensor], rows: Tensor, keep: Tensor, n_keep: Tensor) -> None:
    """kvlib.kernels.compact.compact, without waiting for the device.

    One launch plans, then one moves two tensors of the same shape that follow each other: keys with values, positions
    with state.
    """
    L, R, H, n = keep.shape
    assert keep.dtype == torch.bool and keep.stride(-1) == 1, "keep: bool, its slots side by side"
    assert rows.dtype == n_keep.dtype == torch.int64 and rows.shape == n_keep.shape == (R,), "rows, n_keep: int64 [R]"
    assert rows.is_contiguous() and n_keep.is_contiguous()
    for tensor in tensors:
        assert tensor.shape[0] >= L and tensor.shape[2] >= H and tensor.shape[3] >= n, "keep has more than a tensor"
        assert L in (1, tensor.shape[0]) and H in (1, tensor.shape[2]), "keep: the layers and heads of a tensor, or 1"
        assert tensor[0, 0, 0, 0].is_contiguous(), "the elements of a slot lie side by side"
    # As many survivors leave the tail as there are holes below it: at most half of the slots.
    source = torch.empty(L, R, H, max(1, n // 2), dtype=torch.int32, device=keep.device)
    target = torch.empty_like(source)
    n_moves = torch.empty(L, R, H, dtype=torch.int32, device=keep.device)
    plan_kernel[(L, R, H)](
        keep, n_keep, source, target, n_moves, n, source.shape[-1], *keep.stride()[:3], SLOTS=PLAN_SLOTS
    )
    waiting = list(tensors)
    while waiting:
        pair = waiting[: 1 + (len(waiting) > 1 and waiting[0].shape == waiting[1].shape)]
        _move(pair, rows, source, target, n_moves)
        waiting = waiting[len(pair) :]
