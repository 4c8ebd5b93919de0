"""The published dimensions of R1-Qwen-7B and R1-Llama-8B, for speed on random weights where the checkpoints are not."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from kvlib.cost import SHAPES
from kvlib.engine.attention import IMPLEMENTATION


def r1_qwen_config() -> Qwen2Config:
    """DeepSeek-R1-Distill-Qwen-7B: 28 layers, 28 query and 4 KV heads of 128, biases on q, k, v, untied output."""
    return Qwen2Config(
        **SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"],
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        use_sliding_window=False,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def r1_llama_config() -> LlamaConfig:
    """DeepSeek-R1-Distill-Llama-8B: 32 layers, 32 query and 8 KV heads of 128, no biases, untied output."""
    return LlamaConfig(
        **SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"],
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
    )


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
