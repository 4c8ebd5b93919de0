"""Small random models and solo decoding, shared by the engine's tests."""

import dataclasses

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvlib.attention import IMPLEMENTATION
from kvlib.generate import Completion, Decoder, Request, generate
from kvlib.policies import DynTS, Policy, make_policy
from kvlib.sampling import Sampling

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 56,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def random_model(family: str) -> torch.nn.Module:
    """Three layers, group size 7 (that of R1-Qwen), float64, decoding through kvlib."""
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = model(config(**SHAPE, **extra)).double().eval()
    model.set_attn_implementation(IMPLEMENTATION)
    return model


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
