"""Sampling has transformers' support and probabilities, and noise that only its key decides."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvlib.engine import noise
from kvlib.engine.sampling import Sampling
from kvlib.kernels.noise import MASK, gumbel, uniform
from kvlib.kernels.sampler import FEW, HIGHEST


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.6, 1.0, 0), (0.6, 0.95, 20), (1.3, 0.5, 0), (1.0, 1.0, 3)]
)
def test_draws_follow_transformers_warpers(temperature, top_p, top_k):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)[0]
    n = 40_000
    draws = Sampling(temperature, top_p, top_k)(logits.expand(n, -1), torch.arange(n), torch.zeros(n, dtype=torch.long))
    frequency = draws.bincount(minlength=40) / n
    assert set(draws.tolist()) <= set(expected.nonzero().flatten().tolist())
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


def in_float64(sampling: Sampling, logits, request, step):
    """The definition, with float64 for every id."""
    logits, V = logits.double() / sampling.temperature, logits.shape[-1]
    ids = torch.arange(V).expand_as(logits)
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = logits.topk(min(sampling.top_k or V, V), -1)
    if sampling.top_p < 1:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities.cumsum(-1) - probabilities >= sampling.top_p, -torch.inf)
    winner = (logits + gumbel(request[:, None], step[:, None], ids)).argmax(-1, keepdim=True)
    return ids.gather(-1, winner)[:, 0]


@pytest.mark.parametrize(("n", "V"), [(400, 700), (12, 2 * FEW)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [(0.6, 0.95, 20), (0.6, 0.95, 0), (1.3, 1.0, 3), (0.6, 1.0, 0), (3.0, 1.0, 0)])
def test_draws_are_those_of_float64_token_for_token_ties_included(settings, dtype, n, V):
    draw = torch.Generator().manual_seed(7)
    logits = (torch.randn(n, V, generator=draw) * 3).to(dtype)
    logits[n // 2 :] = (logits[n // 2 :] * 2).round() / 2  # many equals
    request, step = torch.randint(0, 2**32, (n,), generator=draw), torch.arange(n)
    expected = in_float64(Sampling(*settings), logits, request, step)
    assert torch.equal(Sampling(*settings)(logits, request, step), expected)


def test_a_draw_depends_on_its_key_only():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    sampling, request, step = Sampling(1.0), torch.arange(6) * 77, torch.arange(6)
    together = sampling(logits, request, step)
    for i in range(6):
        assert sampling(logits[i : i + 1], request[i : i + 1], step[i : i + 1])[0] == together[i]


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 30)
    zeros = torch.zeros(5, dtype=torch.long)
    assert torch.equal(Sampling(0.0)(logits, zeros, zeros), logits.argmax(-1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_noise_is_inside_the_open_interval(a, b):
    assert 0.0 < uniform(torch.tensor([a]), torch.tensor([b])).item() < 1.0


def test_noise_is_uniform_and_uncorrelated():
    u = uniform(torch.arange(400)[:, None], torch.arange(500)[None])
    assert abs(u.mean().item() - 0.5) < 3e-3
    assert abs(u.var().item() - 1 / 12) < 1e-3
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 0.01
    assert u.unique().numel() > 0.999 * u.numel()


def test_noise_keys_tell_their_parts_apart():
    keys = {noise.key(seed, f"chain-a/{i}", sample) for seed in range(5) for i in range(200) for sample in range(4)}
    assert len(keys) == 5 * 200 * 4
    assert noise.key("a", "bc") != noise.key("ab", "c")


def test_no_noise_is_above_the_bound_by_which_logits_are_left_out():
    assert -math.log(-math.log((MASK + 0.5) / 2**32)) < HIGHEST
    drawn = gumbel(torch.arange(2_000_000))
    assert drawn.max() < HIGHEST


def test_logits_that_are_no_numbers_draw_an_id_of_the_vocabulary():
    """The engine says so two steps later; the embedding must not fail first."""
    logits = torch.full((2, 2 * FEW), float("nan"))
    ids = Sampling(0.6, 1.0, 0)(logits, torch.arange(2), torch.zeros(2, dtype=torch.long))
    assert ((ids >= 0) & (ids < 2 * FEW)).all()
