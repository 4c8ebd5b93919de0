"""Freeing slots in place: survivors of the tail move into the holes below, nothing else moves."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(tensors: Sequence[Tensor], rows: Tensor, keep: Tensor, n_keep: Tensor) -> None:
    """Free slots of distinct rows `[R]` int64 in every tensor `[L or 1, B, H or 1, N, ...]`, in place.

    keep `[L or 1, R, H or 1, n]` bool over the first n slots, with exactly n_keep `[R]` int64 True per head. Survivors
    at slots >= n_keep move into the holes below it, paired by rank; all else stays as it is. A keep set that tensors
    share has size 1 where they do.
    """
    if keep.device.type == "cpu":
        source, target = move_plan(keep, n_keep)
        for tensor in tensors:
            move_slots(tensor, rows, source, target)
    else:
        from kvlib.kernels.compact_triton import compact_slots

        compact_slots(list(tensors), rows, keep, n_keep)


def move_plan(keep: Tensor, n_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Pair survivors at slots >= n_keep with holes below it, by rank.

    keep `[..., R, H, N]` bool with exactly n_keep `[R]` True per head -> source, target `[..., R, H, M]`, M the largest
    number of moves of any head. Where a head has fewer, the rest copy the last slot onto itself, which then is no hole.
    """
    N = keep.shape[-1]
    slot = torch.arange(N, device=keep.device)
    below = slot < n_keep.view(-1, 1, 1)
    holes, movers = below & ~keep, ~below & keep
    n_moves = holes.sum(-1, keepdim=True)
    M = int(n_moves.max())
    target = holes.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :M]
    source = movers.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :M]
    unused = torch.arange(M, device=keep.device) >= n_moves
    return source.masked_fill(unused, N - 1), target.masked_fill(unused, N - 1)


def move_slots(tensor: Tensor, rows: Tensor, source: Tensor, target: Tensor) -> None:
    """In place, for `tensor [L, B, H, N, ...]`: copy slot source to slot target, for the rows `[R]` of the batch.

    source and target `[L or 1, R, H or 1, M]`; the sets are disjoint except for copies onto itself.
    """
    L, _, H = tensor.shape[:3]
    layer = torch.arange(L, device=tensor.device).view(L, 1, 1, 1)
    row = rows.view(1, -1, 1, 1)
    head = torch.arange(H, device=tensor.device).view(1, 1, H, 1)
    tensor[layer, row, head, target] = tensor[layer, row, head, source]
