"""The noise of kvlib.kernels.noise inside a kernel: the same bits, and the same float64 to the last place but one."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """murmur3 fmix32 on uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def absorb(state, counter):
    """The next state; counter of any integer type, its low 32 bits count."""
    return mix(mix(counter.to(tl.uint32)) + state * 3 + 1)


@triton.jit
def gumbel(state):
    """Standard Gumbel, float64: in float32, 1 in 2^25 draws would be infinite."""
    uniform = (state.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform))
