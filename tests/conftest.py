"""Small random models and solo decoding, shared by the engine's tests."""

import dataclasses

import pytest
import torch

from kvlib.generate import Completion, Decoder, Request, generate
from kvlib.invariants import FAMILIES, random_model
from kvlib.policies import DynTS, Policy, make_policy
from kvlib.sampling import Sampling


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request):
    return random_model(request.param)


@pytest.fixture(scope="session")
def qwen2():
    return random_model("qwen2")


def small_policy(name: str, **options) -> Policy:
    """A preset scaled to budgets of a few dozen slots, with a fixed linear predictor where one is needed."""
    scaled = {"snapkv": {"buffer": 6}, "rkv": {"buffer": 6}, "random": {"buffer": 3}}
    if name.startswith("dynts"):
        scaled[name] = {"n_recent": 8}
    policy = make_policy(name, **{**scaled.get(name, {}), **options})
    if isinstance(policy, DynTS):
        policy = dataclasses.replace(policy, predictor=lambda hidden: hidden[..., :5].sum(-1))
    return policy


def reversed_heads(policy: Policy) -> Policy:
    """The policy for a model whose KV heads are in reverse order: only what is held per head differs."""
    return policy


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
    """Completions by request id; request i goes to row i mod n_rows."""
    decoder = Decoder(
        model,
        policy,
        kv_budget,
        n_rows=n_rows,
        n_prompt_max=max(len(request.prompt) for request in requests),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature),
        eos_ids=options.pop("eos_ids", ()),
        **options,
    )
    queues = [requests[row::n_rows] for row in range(n_rows)]
    return {completion.request.id: completion for completion in generate(decoder, queues)}


def as_requests(prompts: list[tuple[int, ...]]) -> list[Request]:
    return [Request(str(i), prompt, 1000 + i) for i, prompt in enumerate(prompts)]
