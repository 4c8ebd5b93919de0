"""Freeing slots in place: survivors of the tail move into the holes below, nothing else moves."""

import torch
from torch import Tensor


def move_plan(keep: Tensor, n_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Pair survivors at slots >= n_keep with holes below it, by rank.

    keep `[..., R, H, N]` bool with exactly n_keep `[R]` (< N) True per head -> source, target `[..., R, H, M]`,
    M = N - min(n_keep). Where a head has fewer than M moves, the rest copy the last slot onto itself,
    which is never a hole.
    """
    N = keep.shape[-1]
    M = N - int(n_keep.min())
    slot = torch.arange(N, device=keep.device)
    below = slot < n_keep.view(-1, 1, 1)
    holes, movers = below & ~keep, ~below & keep
    target = holes.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :M]
    source = movers.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :M]
    unused = torch.arange(M, device=keep.device) >= holes.sum(-1, keepdim=True)
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
