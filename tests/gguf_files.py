"""Small GGUF files with random weights, as llama.cpp's converter writes them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

N_LAYERS, HIDDEN, N_HEADS, N_KV_HEADS, WIDE, D = 2, 64, 4, 2, 96, 16
SPECIAL = ["<|begin|>", "<|end|>", "<think>", "</think>"]


def byte_tokens() -> list[str]:
    """How byte-level BPE spells the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def write_gguf(
    path, kind="llama", *, factors=None, scaling=None, keys=(), drop=(), extra=None, tied=False, quant="F32"
):
    """A file of architecture kind: factors in rope_freqs.weight, scaling a dict of rope.scaling keys, keys any others.

    drop: names of tensors left out; extra: tensors too many, by name. quant: the type of the matrices.
    """
    tokens = [*byte_tokens(), *SPECIAL, "ab"]
    file = GGUFWriter(path, kind)
    file.add_context_length(4096)
    file.add_block_count(N_LAYERS)
    file.add_embedding_length(HIDDEN)
    file.add_feed_forward_length(WIDE)
    file.add_head_count(N_HEADS)
    file.add_head_count_kv(N_KV_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(500_000.0)
    if kind == "llama":
        file.add_rope_dimension_count(D)
        file.add_vocab_size(len(tokens))
    if kind == "qwen3":
        file.add_key_length(D)
        file.add_value_length(D)
    for key, value in (scaling or {}).items():
        add = {str: file.add_string, int: file.add_uint32, float: file.add_float32}[type(value)]
        add(f"{kind}.rope.scaling.{key}", value)
    for key, value in keys:
        (file.add_uint32 if isinstance(value, int) else file.add_float32)(key, value)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("llama-bpe" if kind == "llama" else "qwen2")
    file.add_token_list(tokens)
    file.add_token_types([1] * 256 + [3] * 2 + [4] * 2 + [1])
    file.add_token_merges(["a b"])
    file.add_bos_token_id(256)
    file.add_eos_token_id(257)
    for name, values in tensors(kind, len(tokens), tied, factors, extra or {}).items():
        if name in drop:
            continue
        stored = GGMLQuantizationType[quant] if values.ndim == 2 else GGMLQuantizationType.F32
        packed = gguf.quantize(values, stored)
        file.add_tensor(name, packed, raw_dtype=stored)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def tensors(kind: str, n_tokens: int, tied: bool, factors, extra: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    found = {"token_embd.weight": drawn(n_tokens, HIDDEN), "output_norm.weight": 1 + drawn(HIDDEN)}
    if not tied:
        found["output.weight"] = drawn(n_tokens, HIDDEN)
    for i in range(N_LAYERS):
        rows = {"q": N_HEADS * D, "k": N_KV_HEADS * D, "v": N_KV_HEADS * D}
        layer = {f"attn_{x}.weight": drawn(n, HIDDEN) for x, n in rows.items()}
        layer |= {f"attn_{x}.bias": drawn(n) for x, n in rows.items() if kind == "qwen2"}
        layer |= {f"attn_{x}_norm.weight": 1 + drawn(D) for x in ("q", "k") if kind == "qwen3"}
        layer |= {"attn_output.weight": drawn(HIDDEN, N_HEADS * D), "ffn_down.weight": drawn(HIDDEN, WIDE)}
        layer |= {f"ffn_{x}.weight": drawn(WIDE, HIDDEN) for x in ("gate", "up")}
        layer |= {f"{x}_norm.weight": 1 + drawn(HIDDEN) for x in ("attn", "ffn")}
        found |= {f"blk.{i}.{name}": values for name, values in layer.items()}
    if factors is not None:
        found["rope_freqs.weight"] = np.array(factors, np.float32)
    return found | extra
