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
    if keep.device.type != "cpu":
        from kvlib.kernels.compact_triton import compact_slots

        compact_slots(list(tensors), rows, keep, n_keep)
        return
    N = keep.shape[-1]
    slot = torch.arange(N)
    below = slot < n_keep.view(-1, 1, 1)
    holes, movers = below & ~keep, ~below & keep
    n_moves = holes.sum(-1, keepdim=True)
    M = int(n_moves.max())
    # A head of fewer than M moves has others copy the last slot onto itself, which then is no hole.
    unused = torch.arange(M) >= n_moves
    source, target = (
        chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :M].masked_fill(unused, N - 1)
        for chosen in (movers, holes)
    )
    for tensor in tensors:
        L, _, H = tensor.shape[:3]
        layer, head = torch.arange(L).view(L, 1, 1, 1), torch.arange(H).view(1, 1, H, 1)
        row = rows.view(1, -1, 1, 1)
        tensor[layer, row, head, target] = tensor[layer, row, head, source]
