"""Small random models of many families, for the tests of the general step."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ALL_FULL = {"sliding_window": None}
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MLA = MOE | {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONV = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
GEMMA4 = SLIDING | {"vocab_size_per_layer_input": 64, "global_head_dim": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": ALL_FULL,
    "ministral3": ALL_FULL,
    "mixtral": MOE | ALL_FULL,
    "phi": {},
    "phi3": ALL_FULL,
    "phimoe": MOE | ALL_FULL,
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": MOE,
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "granitemoe": MOE,
    "glm4": {},
    "glm4_moe": MOE,
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere": {},
    "cohere2": SLIDING,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "gpt_oss": MOE | SLIDING,
    "mimo_v2_flash": MOE | SLIDING,
    "gemma": {},
    "gemma2": SLIDING | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 4},
    "vaultgemma": SLIDING,
    "gemma4_text": GEMMA4 | {"num_kv_shared_layers": 0},
    "gemma4_text, shared": GEMMA4
    | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * SLIDING["layer_types"]},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "glm4_moe_lite": MLA,
    "qwen3_next": MOE | LINEAR,
    "qwen3_5_text": LINEAR,
    "olmo_hybrid": LINEAR,
    "lfm2": CONV,
    "lfm2_moe": MOE | CONV,
    "granitemoehybrid": MOE | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "minimax_m2": MOE,
    "afmoe": MOE | SLIDING,
    "jetmoe": MOE,
    "dots1": MOE | ALL_FULL,
    "solar_open": MOE,
    "exaone4": SLIDING,
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "arcee": {},
    "apertus": {},
    "helium": {},
    "bitnet": {},
    "diffllama": {},
    "internlm3": {},
    "persimmon": {},
    "nemotron": {},
    "stablelm": {},
    "starcoder2": ALL_FULL,
    "gpt_neox": {},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {},
    "ctrl": GPT2 | {"dff": 48},
}
"""By model type (up to a comma), what its config needs beside SHAPE."""
CORE = ("llama", "mistral", "mixtral", "phi3", "olmo2", "olmo3", "granite", "glm4", "smollm3", "cohere2", "qwen3_moe")
CORE += ("gpt_oss", "gemma2", "gemma3_text", "gemma4_text", "gemma4_text, shared", "deepseek_v3", "qwen3_next")
CORE += ("qwen3_5_text", "lfm2", "falcon_h1", "diffllama", "jetmoe", "stablelm", "gpt2")
"""Those tried in every run of the tests: the best known, and one of each way to differ."""


def random_family(name: str, dtype: torch.dtype = torch.float64, **given) -> torch.nn.Module:
    """A model with weights so large that attention matters; eager experts, since grouped ones take no double.

    given: of its config; an ellipsis leaves a name out.
    """
    options = {**SHAPE, **FAMILIES.get(name, {}), **given}
    config = AutoConfig.for_model(name.split(",")[0], **{key: x for key, x in options.items() if x is not ...})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model.to(dtype).eval()
