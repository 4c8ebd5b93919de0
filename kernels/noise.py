"""Counter-based noise: the same counters always give the same number, whatever else is drawn or batched."""

import torch
from torch import Tensor

MASK, SIGN = 0xFFFFFFFF, 0x80000000
START, STRIDE = 0x9E3779B9, 3
MULTIPLY = 0x85EBCA6B, 0xC2B2AE35


def _signed(x: int) -> int:
    """The int32 of these 32 bits."""
    return ((x & MASK) ^ SIGN) - SIGN


def _mix_(x: Tensor) -> Tensor:
    """murmur3 fmix32, a bijection, in place on int32, whose product wraps as an unsigned one does."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(MULTIPLY[0])
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(MULTIPLY[1])
    x ^= (x >> 16) & 0xFFFF
    return x


def hashed(*counters: Tensor) -> Tensor:
    """32 random bits, as int32, from broadcastable integer counters in [0, 2^32)."""
    state: Tensor | int = _signed(START * STRIDE)
    for counter in counters:
        mixed = _mix_(counter.to(torch.int32, copy=True))
        state = _mix_(mixed + (state * STRIDE if isinstance(state, Tensor) else state) + 1)
    return state


def uniform(*counters: Tensor) -> Tensor:
    """Uniform in (0, 1), float64, from broadcastable integer counters in [0, 2^32)."""
    return ((hashed(*counters) ^ _signed(SIGN)).double() + (SIGN + 0.5)) / 2.0**32


def gumbel(*counters: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, keyed as uniform."""
    return uniform(*counters).log_().neg_().log_().neg_()
