"""RoPE as a rotation that can be added to keys and queries, or taken off them."""

import torch
from torch import Tensor


def rotate(x: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Move `x [..., D]` by `shift [...]` positions (negative: back, a key at position p by -p is before RoPE).

    Pairs are (x[f], x[f + D/2]), as in Llama and Qwen; inv_freq `[D / 2]`. Phases are float64, since they reach 10^5.
    """
    phase = shift.double()[..., None] * inv_freq.double()
    cos, sin = phase.cos(), phase.sin()
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
