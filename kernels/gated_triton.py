"""Gate, up and activation of a few rows in one launch, which reads the weights once and writes no products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.attention_triton import compute_type

MOST_ROWS = 64
"""On an H100, cuBLAS and the activation take 7 % more at 20 rows, 7 % more at 64, and 4 % less at 128."""
BLOCK, INNER = 32, 128  # outputs, and inputs at a time, of a program


@triton.jit
def gated_kernel(
    x, weight, out, n_rows, n, d, ROWS: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, COMPUTE: tl.constexpr
):
    """One block of outputs of all rows: weight tiles are the left factor, so that few rows waste little."""
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    real = row < n_rows
    kind = out.dtype.element_ty
    gate_tile = weight + output[:, None].to(tl.int64) * d + inner[None, :]
    up_tile = gate_tile + n.to(tl.int64) * d
    x_tile = x + row[:, None] * d + inner[None, :]
    gate, up = tl.zeros([BLOCK, ROWS], tl.float32), tl.zeros([BLOCK, ROWS], tl.float32)
    for _ in range(0, d, INNER):
        factor = tl.trans(tl.load(x_tile, mask=real[:, None], other=0.0).to(COMPUTE))
        gate = tl.dot(tl.load(gate_tile).to(COMPUTE), factor, gate)
        up = tl.dot(tl.load(up_tile).to(COMPUTE), factor, up)
        gate_tile += INNER
        up_tile += INNER
        x_tile += INNER
    # Rounded where the plain way writes it out.
    gate = gate.to(kind).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    up = up.to(kind).to(tl.float32)
    tl.store(out + row[None, :] * n + output[:, None], (gate * up).to(kind), mask=real[None, :])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `gated` is meant for these: few rows, whole tiles, contiguous and of one type."""
    whole = weight.shape[0] % (2 * BLOCK) == 0 and weight.shape[1] % INNER == 0
    return len(x) <= MOST_ROWS and whole and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()


@torch.library.custom_op("kvlib::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor) -> Tensor:
    """As `kvlib.kernels.gated.gated`, where `fits`; float16 or bfloat16."""
    n_rows, d = x.shape
    n = weight.shape[0] // 2
    assert weight.shape == (2 * n, d) and fits(x, weight), (x.shape, weight.shape, x.dtype, weight.dtype)
    out = x.new_empty(n_rows, n)
    gated_kernel[(n // BLOCK,)](
        x, weight, out, n_rows, n, d, ROWS=max(16, triton.next_power_of_2(n_rows)), BLOCK=BLOCK, INNER=INNER,
        COMPUTE=compute_type(x.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@gated.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight) // 2)
