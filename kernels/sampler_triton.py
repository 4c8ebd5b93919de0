"""The sampler in two launches: the largest logit of each block, then the draw from the blocks with the largest."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlib.kernels.noise_triton import absorb, gumbel

BLOCK, BLOCKS = 64, 64  # logits of a block, and blocks of a program
NOISY_BLOCK = 2048
LARGEST_TOP_K = 64
DRAW_WARPS = 8


def padded(n: int) -> int:
    return max(2, triton.next_power_of_2(n))


@triton.jit
def request_state(request, step, row):
    state = absorb(tl.full((), 0x9E3779B9, tl.uint32), tl.load(request + row))
    return absorb(state, tl.load(step + row))


@triton.jit
def largest_kernel(logits, largest, n_vocabulary, n_blocks, logits_row, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The largest logit of every block of a row: largest float32 `[B, n_blocks]`."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * logits_row + ids, mask=ids < n_vocabulary, other=-float("inf")).to(tl.float32)
    tl.store(largest + row * n_blocks + block, tl.max(x, 1), mask=block < n_blocks)


@triton.jit
def draw_kernel(
    logits, request, step, largest, drawn, n_vocabulary, n_blocks, logits_row,
    TEMPERATURE: tl.constexpr, TOP_P: tl.constexpr, K: tl.constexpr, FROM: tl.constexpr, K_PADDED: tl.constexpr,
    N_PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Top-k, top-p and the Gumbel maximum of one row, in float64; of equal logits the lower id ranks first.

    The K largest logits are in the K blocks with the largest ones, FROM of which are looked at: K, or all there are.
    """
    row = tl.program_id(0)
    rank, block = tl.arange(0, K_PADDED), tl.arange(0, N_PADDED)
    x = tl.load(largest + row.to(tl.int64) * n_blocks + block, mask=block < n_blocks, other=-float("inf"))
    chosen = n_blocks + rank  # beyond the vocabulary, so without logits
    for k in range(FROM):
        top, at = tl.max(x, 0, return_indices=True)
        chosen = tl.where(rank == k, tl.where(top > -float("inf"), at, n_blocks + k), chosen)
        x = tl.where(block == at, -float("inf"), x)
    place = tl.sum((chosen[:, None] > chosen[None, :]).to(tl.int32), 1)
    chosen = tl.sum(tl.where(place[:, None] == rank[None, :], chosen[:, None], 0), 0)  # by id

    ids = tl.reshape(chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], (K_PADDED * BLOCK,))
    x = tl.load(logits + row.to(tl.int64) * logits_row + ids, mask=ids < n_vocabulary, other=-float("inf"))
    x = x.to(tl.float32)
    candidate = tl.arange(0, K_PADDED * BLOCK)
    logit = tl.full((K_PADDED,), -float("inf"), tl.float64)
    best_id = tl.zeros((K_PADDED,), tl.int32)
    for k in range(K):
        top, at = tl.max(x, 0, return_indices=True)
        logit = tl.where(rank == k, top.to(tl.float64), logit)
        best_id = tl.where(rank == k, tl.sum(tl.where(candidate == at, ids, 0), 0).to(tl.int32), best_id)
        x = tl.where(candidate == at, -float("inf"), x)
    logit = logit / tl.full((), TEMPERATURE, tl.float64)
    mass = tl.exp(logit - tl.max(logit, 0))
    above = tl.cumsum(mass, 0) - mass
    noise = gumbel(absorb(request_state(request, step, row), best_id))
    score = tl.where(
        (rank < K) & (above < tl.full((), TOP_P, tl.float64) * tl.sum(mass, 0)), logit + noise, -float("inf")
    )
    winner = tl.argmax(score, 0)
    # An id of the vocabulary even where logits are NaN, so that the step after runs until the host sees that.
    drawn_id = tl.minimum(tl.sum(tl.where(rank == winner, best_id, 0), 0), n_vocabulary - 1)
    tl.store(drawn + row, drawn_id.to(tl.int64))


@triton.jit
def noisy_kernel(
    logits, request, step, best, best_id, n_vocabulary, logits_row, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr
):
    """The maximum of logits / temperature + noise in a block, and its id: best float64, best_id `[B, blocks]`."""
    block, row = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * logits_row + ids, mask=ids < n_vocabulary, other=-float("inf"))
    noise = gumbel(absorb(request_state(request, step, row), ids))
    # A constant as it stands would be float32.
    x = x.to(tl.float64) / tl.full((), TEMPERATURE, tl.float64) + noise
    top, at = tl.max(x, 0, return_indices=True)
    out = row.to(tl.int64) * tl.num_programs(0) + block
    tl.store(best + out, top)
    tl.store(best_id + out, tl.minimum(block * BLOCK + at, n_vocabulary - 1).to(tl.int64))


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
    if not top_k:
        n_blocks = triton.cdiv(V, NOISY_BLOCK)
        best = torch.empty(B, n_blocks, dtype=torch.float64, device=logits.device)
        best_id = torch.empty(B, n_blocks, dtype=torch.int64, device=logits.device)
        noisy_kernel[(n_blocks, B)](
            logits, request, step, best, best_id, V, logits.stride(0), TEMPERATURE=temperature, BLOCK=NOISY_BLOCK,
        )  # fmt: skip
        return best_id.gather(1, best.argmax(1, keepdim=True))[:, 0]
    k, n_blocks = min(top_k, V), triton.cdiv(V, BLOCK)
    largest = torch.empty(B, n_blocks, dtype=torch.float32, device=logits.device)
    drawn = torch.empty(B, dtype=torch.int64, device=logits.device)
    largest_kernel[(triton.cdiv(n_blocks, BLOCKS), B)](
        logits, largest, V, n_blocks, logits.stride(0), BLOCK=BLOCK, BLOCKS=BLOCKS,
    )  # fmt: skip
    draw_kernel[(B,)](
        logits, request, step, largest, drawn, V, n_blocks, logits.stride(0),
        TEMPERATURE=temperature, TOP_P=top_p, K=k, FROM=min(k, n_blocks), K_PADDED=padded(k),
        N_PADDED=padded(n_blocks), BLOCK=BLOCK, num_warps=DRAW_WARPS,
    )  # fmt: skip
    return drawn


@sample_ids.register_fake
def _(logits, request, step, temperature, top_p, top_k) -> Tensor:
    return torch.empty_like(request)
