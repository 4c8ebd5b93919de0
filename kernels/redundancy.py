"""Redundancy of keys: how similar each is to all others (R-KV, arXiv 2505.24133)."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 512


def redundancy(keys: Tensor, threshold: float | None) -> Tensor:
    """softmax over slots j of the mean cosine between key j and all keys i: `[..., N, D]` -> `[..., N]`.

    The diagonal counts 0, and so does, for each i, the newest j more similar than the threshold: the newest of a
    set of duplicates is spared. An i without such a j spares slot 0, a side effect of the original that is kept;
    threshold None spares none
    (`cal_similarity`, Zefan-Cai/R-KV, rkv/utils.py, with each batch row compared with itself only).
    """
    N = keys.shape[-2]
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    unit = wide / (wide.norm(dim=-1, keepdim=True) + 1e-8)
    slot = torch.arange(N, device=keys.device)
    total = torch.zeros_like(unit[..., 0])
    for start in range(0, N, ROWS_AT_ONCE):
        rows = slot[start : start + ROWS_AT_ONCE]
        cosine = unit[..., rows, :] @ unit.transpose(-1, -2)
        cosine = cosine.masked_fill(rows[:, None] == slot, 0.0)
        if threshold is not None:
            newest = torch.where(cosine > threshold, slot, 0).amax(-1, keepdim=True)
            cosine = cosine.scatter(-1, newest, 0.0)
        total += cosine.sum(-2)
    return (total / N).softmax(-1)
