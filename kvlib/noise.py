"""Counter-based noise: the same key always gives the same number, whatever else is drawn or batched."""

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def key(*parts: object) -> int:
    """A 32-bit key from anything printable, e.g. key(seed, problem_id, sample)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit finaliser (murmur3 fmix32) on int64 tensors."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def uniform(*counters: Tensor | int) -> Tensor:
    """Uniform in (0, 1), float64, from broadcastable integer counters in [0, 2^32)."""
    state = torch.as_tensor(0x9E3779B9)
    for counter in counters:
        state = _mix((_mix(torch.as_tensor(counter).long() & MASK) + state.to(_device(counters)) * 3 + 1) & MASK)
    return (state.double() + 0.5) / 2.0**32


def _device(counters: tuple[Tensor | int, ...]) -> torch.device:
    return next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))


def gumbel(*counters: Tensor | int) -> Tensor:
    """Standard Gumbel noise, float64, keyed as uniform."""
    return -torch.log(-torch.log(uniform(*counters)))
