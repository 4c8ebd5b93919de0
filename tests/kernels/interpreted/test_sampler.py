"""The sampler's kernels against their reference, in Triton's interpreter: the same bits, and so the same draws."""

import pytest
import torch
import triton
import triton.language as tl

from kvlib.kernels import noise
from kvlib.kernels.noise_triton import absorb, gumbel
from kvlib.kernels.sampler import sample
from kvlib.kernels.sampler_triton import BLOCK, NOISY_BLOCK, sample_ids


@triton.jit
def noise_kernel(counter, state, drawn, N: tl.constexpr):
    at = tl.arange(0, N)
    hashed = absorb(tl.full((), 0x9E3779B9, tl.uint32), tl.load(counter + at))
    hashed = absorb(absorb(hashed, at), tl.load(counter + at))
    tl.store(state + at, hashed.to(tl.int32, bitcast=True))
    tl.store(drawn + at, gumbel(hashed))


def test_the_hash_is_equal_bit_by_bit():
    counter = torch.randint(0, 2**32, (512,), generator=torch.Generator().manual_seed(0))
    counter[:4] = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1])
    state, drawn = torch.empty(512, dtype=torch.int32), torch.empty(512, dtype=torch.float64)
    noise_kernel[(1,)](counter, state, drawn, N=512)
    keys = counter, torch.arange(512), counter
    assert torch.equal(state, noise.hashed(*keys))
    torch.testing.assert_close(drawn, noise.gumbel(*keys), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "temperature", "top_p", "top_k"),
    [
        (2 * BLOCK + 7, 0.6, 0.95, 20),
        (50 * BLOCK + 7, 0.6, 0.95, 20),
        (NOISY_BLOCK + 1, 1.3, 1.0, 0),
        (30, 1.0, 1.0, 3),
        (30, 2.0, 0.5, 64),
    ],
)
def test_draws_equal_the_reference(V, temperature, top_p, top_k, dtype):
    draw = torch.Generator().manual_seed(V)
    logits = torch.full((3, V + 5), torch.nan, dtype=dtype)[:, :V]  # a strided view
    # No two are equal, in any dtype: torch's choice among equals is its own.
    logits[:] = torch.stack([torch.randperm(V, generator=draw) for _ in range(3)]) / V * 8
    if dtype != torch.float32:
        logits[:, 30:] = -30
        logits[:, :30] = torch.stack([torch.randperm(30, generator=draw) for _ in range(3)]).to(dtype) / 4
    request, step = torch.randint(0, 2**32, (3,), generator=draw), torch.arange(3) * 1000
    expected = sample(logits, request, step, temperature, top_p, top_k)
    assert torch.equal(sample_ids(logits, request, step, temperature, top_p, top_k), expected)


@pytest.mark.parametrize("V", [30, 20 * BLOCK])
def test_of_equal_logits_exactly_k_can_be_drawn_the_lowest_ids(V):
    n = 40
    logits = torch.zeros(n, V)
    logits[:, V - 1] = 1.0
    drawn = sample_ids(logits, torch.arange(n), torch.zeros(n, dtype=torch.int64), 1.0, 1.0, 4)
    assert set(drawn.tolist()) == {0, 1, 2, V - 1}


def test_what_may_not_be_drawn_is_not_and_the_rest_is_drawn_as_if_it_were_alone():
    """Whole blocks of minus infinity, and fewer other logits than k, two of them in one block."""
    n, ids = 40, torch.tensor([5, 3 * BLOCK, 3 * BLOCK + 1, 17 * BLOCK + 9])
    logits = torch.full((n, 20 * BLOCK), -torch.inf)
    logits[:, ids] = torch.tensor([1.0, 2.0, 0.5, 1.5])
    keys = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    drawn = sample_ids(logits, *keys, 1.0, 1.0, 20)
    assert torch.equal(drawn, sample(logits, *keys, 1.0, 1.0, 20)) and set(drawn.tolist()) == set(ids.tolist())


def test_logits_that_are_nan_give_an_id_of_the_vocabulary():
    logits, one = torch.full((1, 30), torch.nan), torch.ones(1, dtype=torch.int64)
    for top_k in (0, 4):
        assert 0 <= sample_ids(logits, one, one, 1.0, 1.0, top_k).item() < 30
