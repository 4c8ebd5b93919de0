"""Counter-based noise: the same counters always give the same number, whatever else is drawn or batched."""

import torch
from torch import Tensor

MASK, SIGN = 0xFFFFFFFF, 0x80000000
START, STRIDE = 0x9E3779B9, 3
MULTIPLY = 0x85EBCA6B, 0xC2B2AE35


def _signed(x: int) -> int:
    """The int32 of these 32 bits."""
    return ((x & MASK) ^ SIGN) - SIGN


def _mix(x: int) -> int:
    """Bijective 32-bit finaliser (murmur3 fmix32)."""
    x = ((x ^ (x >> 16)) * MULTIPLY[0]) & MASK
    x = ((x ^ (x >> 13)) * MULTIPLY[1]) & MASK
    return x ^ (x >> 16)


def _mix_(x: Tensor) -> Tensor:
    """_mix in place on int32, whose product wraps as an unsigned one does."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(MULTIPLY[0])
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(MULTIPLY[1])
    x ^= (x >> 16) & 0xFFFF
    return x


def hashed(*counters: Tensor | int) -> Tensor:
    """32 random bits, as int32, from broadcastable integer counters in [0, 2^32)."""
    state: Tensor | int = START
    for counter in counters:
        if isinstance(counter, Tensor):
            mixed = _mix_(counter.to(torch.int32, copy=True))
            stride = state * STRIDE if isinstance(state, Tensor) else _signed(state * STRIDE)
            state = _mix_(mixed + stride + 1)
        elif isinstance(state, Tensor):
            state = _mix_(state * STRIDE + _signed(_mix(counter & MASK) + 1))
        else:
            state = _mix((_mix(counter & MASK) + state * STRIDE + 1) & MASK)
    return state if isinstance(state, Tensor) else torch.tensor(_signed(state), dtype=torch.int32)


def uniform(*counters: Tensor | int) -> Tensor:
    """Uniform in (0, 1), float64, from broadcastable integer counters in [0, 2^32)."""
    return ((hashed(*counters) ^ _signed(SIGN)).double() + (SIGN + 0.5)) / 2.0**32


def gumbel(*counters: Tensor | int) -> Tensor:
    """Standard Gumbel noise, float64, keyed as uniform."""
    return uniform(*counters).log_().neg_().log_().neg_()
