"""What is measured: models at their published dimensions or as they are, prompts, and the policies' settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvlib.cost import SHAPES
from kvlib.engine.attention import IMPLEMENTATION
from kvlib.errors import ConfigError
from kvlib.fitted import fill
from kvlib.models import load_reasoner
from kvlib.policies import Policy, make_policy
from kvlib.policies.dynts import ImportanceHead
from kvlib.policies.triattention import QueryStatistics
from kvlib.tasks.datasets import load_problems

R1 = {
    "r1-qwen": SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"]
    | {
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "r1-llama": SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    | {
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
"""Heads of 128; biases on q, k, v for Qwen only."""


def r1_config(name: str) -> PreTrainedConfig:
    """DeepSeek-R1-Distill-Qwen-7B or -Llama-8B, by the name of its sizes."""
    return AutoConfig.for_model(**R1[name], max_position_embeddings=131072)


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> torch.nn.Module:
    """A causal LM of this config that decodes through kvlib, its weights drawn at random (fixed seed) on the device.

    Of the right size and speed; its text means nothing. Weights normal (config.initializer_range), norms 1, biases
    normal too, so that no product is spared by zeros.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=config.initializer_range)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Sizes:
    """Rows, tokens per prompt and to decode, KV budget (slots), tokens between rounds of eviction."""

    dtype: torch.dtype
    batch: int
    n_prompt: int
    n_new: int
    kv_budget: int
    interval: int


SIZES = {
    "tiny": Sizes(torch.float32, 8, 64, 256, 128, 32),
    "smollm2": Sizes(torch.float32, 8, 64, 512, 256, 64),
    "qwen-coder": Sizes(torch.float32, 8, 64, 512, 256, 64),
    "r1-qwen": Sizes(torch.bfloat16, 20, 1024, 1024, 1280, 128),
    "r1-llama": Sizes(torch.bfloat16, 20, 1024, 1024, 1280, 128),
}

QWEN_CODER = (
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    "@ebb2015119c907b064c512bf053e945850b5875f"
)
GGUF = {"qwen-coder": QWEN_CODER}
"""By the name of its sizes, the file of the hub of a model that is one."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model in transformers' form and the prompts `[B, P]`. fit fills in what a policy needs."""

    name: str
    weights: str
    model: nn.Module
    prompts: Tensor
    eos_ids: tuple[int, ...]
    fit: Callable[[Policy], Policy]


def load_subject(name: str, sizes: Sizes, device: str) -> Subject:
    """A model by the name of its sizes, with prompts cut from the embedded problems, or of random ids where the weights
    are random. Raises ConfigError."""
    if name not in R1:
        model = GGUF.get(name, name)
        reasoner = load_reasoner(model, str(sizes.dtype).removeprefix("torch."), device)
        ids = [i for problem in load_problems("chain-a") for i in reasoner.encode(problem.question)]
        need = sizes.batch * sizes.n_prompt
        ids = (ids * (need // len(ids) + 1))[:need]
        prompts = torch.tensor(ids, device=device).view(sizes.batch, sizes.n_prompt)
        return Subject(name, "real", reasoner.model, prompts, reasoner.eos_ids, lambda p: fill(p, model, reasoner))
    if device == "cpu":
        raise ConfigError(f"{name} has 7 billion parameters and is measured on a CUDA GPU; torch sees none here")
    model = random_model(r1_config(name), sizes.dtype, device)
    return random_subject(name, model, sizes)


def random_subject(name: str, model: nn.Module, sizes: Sizes) -> Subject:
    """Random ids as prompts, and random numbers for what a policy needs fitted."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (sizes.batch, sizes.n_prompt), generator=draw).to(model.device)
    fitted = partial(fitted_at_random, config=model.config, device=model.device)
    return Subject(name, "random weights", model, prompts, (), fitted)


def fitted_at_random(policy: Policy, config: PreTrainedConfig, device: torch.device | str) -> Policy:
    """The policy with random numbers, in the dtypes that fitted ones have, for what it needs of a model."""
    L, H, HQ = config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        statistics = torch.rand(3, L, HQ, config.hidden_size // HQ // 2, dtype=torch.float64)
        made = {
            "predictor": ImportanceHead(config.hidden_size).requires_grad_(False),
            "calibration": QueryStatistics(*statistics),
            "separators": (1, 2, 3),
            "gate": lambda hidden: hidden[None, :, :H].float().sigmoid().log().expand(L, -1, -1),
        }
    return replace(policy, **{need: made[need] for need in policy.needs})


def bench_policy(name: str, kv_budget: int, sizes: Sizes) -> Policy:
    """A preset whose rounds come every sizes.interval tokens and leave kv_budget - interval slots."""
    options = {"buffer": sizes.interval}
    if name == "snapkv-kvpress":
        options |= {"n_obs": observed(sizes), "n_recent": observed(sizes)}
    if name.startswith("dynts"):
        options["n_recent"] = max(0, kv_budget - sizes.interval - sizes.n_prompt) // 2
    return make_policy(name, **options)


def observed(sizes: Sizes) -> int:
    """SnapKV's window. kvpress buffers the hidden states of one interval only, and asks for more of them than this."""
    return min(64, sizes.interval // 2)
