"""The sampler in two launches: the best of each block of the vocabulary, then the draw among those."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.noise_triton import absorb, gumbel

BLOCK = 2048
LARGEST_TOP_K = 64
DRAW_WARPS = 16


def padded(n: int) -> int:
    return max(2, triton.next_power_of_2(n))


@triton.jit
def request_state(request, step, row):
    state = absorb(tl.full((), 0x9E3779B9, tl.uint32), tl.load(request + row))
    return absorb(state, tl.load(step + row))


@triton.jit
def best_kernel(
    logits, request, step, best, best_id, n_vocabulary, logits_row,
    TEMPERATURE: tl.constexpr, K: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The K largest logits of a block, largest first, the lower id of two equals first: best, best_id `[B, blocks, K]`.

    NOISE: of logits / temperature + noise instead.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < n_vocabulary
    x = tl.load(logits + row.to(tl.int64) * logits_row + ids, mask=inside, other=-float("inf"))
    x = x.to(best.dtype.element_ty)
    if NOISE:
        noise = gumbel(absorb(request_state(request, step, row), ids))
        # A constant as it stands would be float32.
        x = x / tl.full((), TEMPERATURE, tl.float64) + noise
    out = (row.to(tl.int64) * tl.num_programs(0) + block) * K
    for k in range(K):
        largest, at = tl.max(x, 0, return_indices=True)
        tl.store(best + out + k, largest)
        tl.store(best_id + out + k, block * BLOCK + at)
        x = tl.where(ids == block * BLOCK + at, -float("inf"), x)


@triton.jit
def draw_kernel(
    request, step, best, best_id, drawn, n_candidates, n_vocabulary,
    TEMPERATURE: tl.constexpr, TOP_P: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Top-k of the candidates `[B, n_candidates]`, top-p and the Gumbel maximum of one row, in float64."""
    row = tl.program_id(0)
    candidate = tl.arange(0, CANDIDATES)
    start = row.to(tl.int64) * n_candidates
    x = tl.load(best + start + candidate, mask=candidate < n_candidates, other=-float("inf"))
    rank = tl.arange(0, K_PADDED)
    logit = tl.full((K_PADDED,), -float("inf"), tl.float64)
    at = tl.zeros((K_PADDED,), tl.int32)
    for k in range(K):
        largest, where = tl.max(x, 0, return_indices=True)
        logit = tl.where(rank == k, largest.to(tl.float64), logit)
        at = tl.where(rank == k, where, at)
        x = tl.where(candidate == where, -float("inf"), x)
    ids = tl.load(best_id + start + at)
    logit = logit / tl.full((), TEMPERATURE, tl.float64)
    mass = tl.exp(logit - tl.max(logit, 0))
    above = tl.cumsum(mass, 0) - mass
    noise = gumbel(absorb(request_state(request, step, row), ids))
    score = tl.where(
        (rank < K) & (above < tl.full((), TOP_P, tl.float64) * tl.sum(mass, 0)), logit + noise, -float("inf")
    )
    winner = tl.argmax(score, 0)
    # An id of the vocabulary even where logits are NaN, so that the step after runs until the host sees that.
    drawn_id = tl.minimum(tl.sum(tl.where(rank == winner, ids, 0), 0), n_vocabulary - 1)
    tl.store(drawn + row, drawn_id.to(tl.int64))


def aligned(x: Tensor) -> Tensor:
    """x, or a copy if its address is no multiple of 16, which would compile another kernel: one row's slice."""
    return x.clone() if x.data_ptr() % 16 else x


@torch.library.custom_op("kvlib::sample", mutates_args=())
def sample_ids(logits: Tensor, request: Tensor, step: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """kvlib.kernels.sampler.sample where top_k is 1 .. LARGEST_TOP_K, or top_k is 0 and top_p is 1."""
    B, V = logits.shape
    assert logits.dtype in (torch.float16, torch.bfloat16, torch.float32) and logits.stride(-1) == 1
    assert request.dtype == step.dtype == torch.int64 and request.shape == step.shape == (B,)
    assert request.is_contiguous() and step.is_contiguous()
    assert 0 < top_k <= LARGEST_TOP_K or (top_k == 0 and top_p == 1), (top_k, top_p)
    request, step = aligned(request), aligned(step)
    k, n_blocks = min(top_k, V) or 1, triton.cdiv(V, BLOCK)
    best = torch.empty(B, n_blocks, k, dtype=torch.float32 if top_k else torch.float64, device=logits.device)
    best_id = torch.empty(B, n_blocks, k, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(B, dtype=torch.int64, device=logits.device)
    best_kernel[(n_blocks, B)](
        logits, request, step, best, best_id, V, logits.stride(0),
        TEMPERATURE=temperature, K=k, NOISE=not top_k, BLOCK=BLOCK,
    )  # fmt: skip
    draw_kernel[(B,)](
        request, step, best, best_id, drawn, n_blocks * k, V,
        TEMPERATURE=temperature, TOP_P=top_p, K=k, K_PADDED=padded(k),
        CANDIDATES=padded(n_blocks * k), num_warps=DRAW_WARPS,
    )  # fmt: skip
    return drawn


@sample_ids.register_fake
def _(logits, request, step, temperature, top_p, top_k) -> Tensor:
    return torch.empty_like(request)
