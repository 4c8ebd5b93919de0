"""Small random models and solo decoding, shared by the engine's tests."""

import dataclasses

import pytest
import torch

from kvlib.engine.decoder import Completion, Request, completions, decoder_for
from kvlib.engine.sampling import Sampling
from kvlib.invariants import random_model
from kvlib.models import FAMILIES
from kvlib.policies import Policy, make_policy
from kvlib.policies.triattention import QueryStatistics


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request):
    return random_model(request.param)


@pytest.fixture(scope="session")
def qwen2():
    return random_model("qwen2")


OBSERVING = {"n_obs": 4, "n_recent": 4, "buffer": 6}
BY_KEYS = {"n_recent": 2, "buffer": 6}
SCALED = {
    "random": {"buffer": 3},
    "random-prompt": {"n_recent": 4, "buffer": 3},
    "snapkv": OBSERVING,
    "snapkv-paper": OBSERVING,
    "snapkv-kvpress": OBSERVING,
    "snapkv-vase": OBSERVING,
    "morphkv": {"n_obs": 4, "n_recent": 4},
    "rkv": OBSERVING,
    "gkv": OBSERVING,
    "vase": OBSERVING,
    # Their interval is longer than any trace here, so that the budget decides; a test of their own has a short one.
    "rpc": OBSERVING,
    "rpc-qwen2": OBSERVING,
    "lazy": {"alpha": 0.02, "n_recent": 6, "buffer": 5},
    "raas": {"alpha": 0.02, "buffer": 4},
    "caote": {"buffer": 4},
    "caote-snapkv": {"buffer": 6},
    "knorm": BY_KEYS,
    "keydiff": BY_KEYS,
    "cur": BY_KEYS,
    "cur-resample": BY_KEYS,
    "lagkv": {"n_sink": 2, "lag_size": 6, "buffer": 6},
    "expected": {"n_sink": 2, "n_obs": 8, "n_future": 8, "buffer": 6},
    "triattention": BY_KEYS,
    "triattention-per-layer": BY_KEYS,
    "triattention-union": BY_KEYS,
    "sepllm": {"n_recent": 8},
    "trimkv": BY_KEYS,
    "dynts": {"n_recent": 8},
    "dynts-published": {"n_recent": 8},
}
"""Settings of each preset for budgets of a few dozen slots."""


def fitted_fields(n_layers: int = 3, n_query_heads: int = 14, n_kv_heads: int = 2, head_dim: int = 4) -> dict:
    """What `kvlib.fitted` would make of a model, here fixed numbers for the random models."""
    draw = torch.Generator().manual_seed(5)
    shape = (n_layers, n_query_heads, head_dim // 2)
    re, im = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(n_layers, 1, n_kv_heads, 5, generator=draw, dtype=torch.float64)
    return {
        "predictor": lambda hidden: hidden[..., :5].sum(-1),
        "calibration": QueryStatistics(re, im, torch.hypot(re, im) + 0.3),
        "separators": (3, 14, 15, 29, 40, 51),
        "gate": lambda hidden: -0.1 * (weights * hidden[..., None, :5]).sum(-1).sigmoid(),
    }


def small_policy(name: str, head_dim: int = 4, **options) -> Policy:
    """A preset scaled to budgets of a few dozen slots, every field that it needs filled in."""
    policy = make_policy(name, **{**SCALED.get(name, {}), **options})
    fields = fitted_fields(head_dim=head_dim)
    return dataclasses.replace(policy, **{need: fields[need] for need in policy.needs})


def reversed_heads(policy: Policy) -> Policy:
    """The policy for a model whose KV heads are in reverse order: only what is held per head differs."""
    if policy.needs != ("calibration",):
        return policy
    own = policy.calibration
    flipped = [x.unflatten(1, (2, 7)).flip(1).flatten(1, 2) for x in (own.mean_re, own.mean_im, own.mean_abs)]
    return dataclasses.replace(policy, calibration=QueryStatistics(*flipped))


def prompts(n: int, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator).tolist()
    return [tuple(torch.randint(0, 64, (length,), generator=generator).tolist()) for length in lengths]


def decode(
    model,
    policy: Policy,
    kv_budget: int | None,
    requests: list[Request],
    n_rows: int,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    **options,
) -> dict[str, Completion]:
    """Completions by request id."""
    settings = {"n_rows": n_rows, "max_new_tokens": max_new_tokens, "sampling": Sampling(temperature), **options}
    decoder = decoder_for(model, policy, kv_budget, requests, **settings)
    return {completion.request.id: completion for completion in completions(decoder, requests)}


def as_requests(prompts: list[tuple[int, ...]]) -> list[Request]:
    return [Request(str(i), prompt, 1000 + i) for i, prompt in enumerate(prompts)]
