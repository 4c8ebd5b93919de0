"""RMSNorm with or without the residual sum before it, and the gated activation: one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU_BLOCK = 1024


@triton.jit
def rms_norm_kernel(x, residual, weight, normed, summed, eps, n, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row `[n]` per program, all of it at once."""
    row = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    i = tl.arange(0, BLOCK)
    inside = i < n
    y = tl.load(x + row * n + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(residual + row * n + i, mask=inside, other=0.0).to(tl.float32)
        y = y.to(kind)
        tl.store(summed + row * n + i, y, mask=inside)
        y = y.to(tl.float32)
    # As transformers: rounded to the model's type before the weight.
    y = (y * tl.rsqrt(tl.sum(y * y, 0) / n + eps)).to(kind).to(tl.float32)
    y *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * n + i, y.to(kind), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, n, BLOCK: tl.constexpr):
    """One block of one row `[2n]` per program."""
    row = tl.program_id(1).to(tl.int64)
    kind = out.dtype.element_ty
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    gate = tl.load(gate_up + row * 2 * n + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + i, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * n + i, (gate * up).to(kind), mask=inside)


@torch.library.custom_op("kvlib::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kvlib.kernels.pointwise.add_rms_norm`, contiguous."""
    assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape, x.dtype, residual.dtype)
    assert residual.is_contiguous(), "residual must be contiguous"
    summed = torch.empty_like(x)
    return _launch_rms_norm(x, residual, weight, summed, eps), summed


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("kvlib::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kvlib.kernels.pointwise.rms_norm`, contiguous."""
    return _launch_rms_norm(x, None, weight, None, eps)


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, summed: Tensor | None, eps: float) -> Tensor:
    B, n = x.shape
    assert weight.shape == (n,) and x.is_contiguous() and weight.is_contiguous(), (x.shape, weight.shape)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(n)
    rms_norm_kernel[(B,)](
        x, x if residual is None else residual, weight, normed, normed if summed is None else summed, eps, n,
        ADD=residual is not None, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return normed


@torch.library.custom_op("kvlib::silu_mul", mutates_args=())
def silu_mul(gate_up: Tensor) -> Tensor:
    """As `kvlib.kernels.pointwise.silu_mul`, contiguous."""
    B, n = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape == (B, 2 * n) and gate_up.is_contiguous(), gate_up.shape
    out = gate_up.new_empty(B, n)
    silu_mul_kernel[triton.cdiv(n, SILU_BLOCK), B](gate_up, out, n, BLOCK=SILU_BLOCK, num_warps=4)
    return out


@silu_mul.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
