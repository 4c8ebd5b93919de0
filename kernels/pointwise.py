"""The decoder block between its matrix products: norms and the gated activation."""

from torch import Tensor
from torch.nn import functional as F


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual `[B, d]` -> (RMSNorm of their sum, their sum), in x's dtype."""
    if x.device.type != "cpu":
        from kvlib.kernels.pointwise_triton import add_rms_norm as kernel

        return kernel(x, residual, weight, eps)
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x `[B, d]` over the root of its mean square, times weight `[d]`; transformers' Qwen2RMSNorm."""
    if x.device.type != "cpu":
        from kvlib.kernels.pointwise_triton import rms_norm as kernel

        return kernel(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up `[B, 2I]`, gate first -> silu(gate) * up `[B, I]`."""
    if gate_up.device.type != "cpu":
        from kvlib.kernels.pointwise_triton import silu_mul as kernel

        return kernel(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
