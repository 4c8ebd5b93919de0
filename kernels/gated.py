"""The first half of a gated MLP: the products of gate and up, and the activation between them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.pointwise import silu_mul


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """x `[B, d]`, weight `[2I, d]`, gate first -> silu(x gate^T) * (x up^T) `[B, I]`, each rounded to x's dtype."""
    if x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        from kvlib.kernels.gated_triton import fits
        from kvlib.kernels.gated_triton import gated as kernel

        if fits(x, weight):
            return kernel(x, weight)
    return silu_mul(F.linear(x, weight))
