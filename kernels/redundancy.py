"""Redundancy of keys: how similar each is to all others (R-KV, arXiv 2505.24133)."""

import torch
from torch import Tensor

AT_ONCE = 2**18
"""Cosines that exist at one time on the CPU, few enough to stay in its cache."""


def redundancy(keys: Tensor, threshold: float | None) -> Tensor:
    """softmax over slots j of the mean cosine between key j and all keys i: `[..., N, D]` -> `[..., N]`.

    The diagonal counts 0, and so does, for each i, the newest j more similar than the threshold: the newest of a
    set of duplicates is spared. An i without such a j spares slot 0, a side effect of the original that is kept;
    threshold None spares none
    (`cal_similarity`, Zefan-Cai/R-KV, rkv/utils.py, with each batch row compared with itself only).
    """
    if keys.device.type == "cpu":
        return mean_cosine(keys, threshold).softmax(-1)
    from kvlib.kernels.redundancy_triton import mean_cosine_by_tiles

    return mean_cosine_by_tiles(keys, threshold).softmax(-1)


def mean_cosine(keys: Tensor, threshold: float | None) -> Tensor:
    """As redundancy, before the softmax; at least float32."""
    N, D = keys.shape[-2:]
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    unit = (wide / (wide.norm(dim=-1, keepdim=True) + 1e-8)).reshape(-1, N, D)
    slot = torch.arange(N, dtype=unit.dtype, device=keys.device)
    total = torch.zeros_like(unit[..., 0])
    n_rows = min(N, max(1, AT_ONCE // N))
    n_heads = max(1, AT_ONCE // (n_rows * N))
    for some, sums in zip(unit.split(n_heads), total.split(n_heads), strict=True):
        for start in range(0, N, n_rows):
            cosine = some[:, start : start + n_rows] @ some.mT
            cosine.diagonal(start, -2, -1).zero_()
            if threshold is not None:
                newest = ((cosine > threshold) * slot).amax(-1, keepdim=True)
                cosine.scatter_(-1, newest.long(), 0.0)
            sums += cosine.sum(-2)
    return (total / N).view(keys.shape[:-1])
