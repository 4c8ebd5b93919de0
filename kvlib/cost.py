"""What a decoding step moves and how long that takes, from a model's shape: what every plan and bench reckons with."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

SHAPES: dict[str, Mapping] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Of models that a plan is made for before they are here, as their config.json has it."""


def minimum_bytes(config, batch: int, live: float, itemsize: int = 2) -> int:
    """The least that a step can move: every weight but the embedding table once, live keys and values once.

    config: of a Llama or Qwen model, as transformers has it, or its config.json as a mapping. live: slots a row.
    """
    config = SimpleNamespace(**config) if isinstance(config, Mapping) else config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    d, q, kv = config.hidden_size, config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    bias = q + 2 * kv if config.model_type == "qwen2" or getattr(config, "attention_bias", False) else 0
    layer = d * (q + 2 * kv) + bias + q * d + 3 * d * config.intermediate_size + 2 * d
    weights = config.num_hidden_layers * layer + d + config.vocab_size * d
    return itemsize * (weights + config.num_hidden_layers * 2 * kv * batch * live)


def kv_bytes(config, itemsize: int = 2) -> int:
    """Of one cached token, all layers."""
    return minimum_bytes(config, 1, 1, itemsize) - minimum_bytes(config, 1, 0, itemsize)


def model_bytes(shape: Mapping, itemsize: int = 2) -> int:
    """Of all weights, on disk and in memory."""
    table = 0 if shape.get("tie_word_embeddings", True) else itemsize * shape["vocab_size"] * shape["hidden_size"]
    return minimum_bytes(shape, 1, 0, itemsize) + table


@dataclass(frozen=True)
class Step:
    """The time of a decoding step on a device: launch_ms + bytes moved / (bandwidth x efficiency).

    gb_per_s: the device's bandwidth. launch_ms: what a step takes however little it reads. live_rows: the share of
    rows at work, less those whose queue has ended.
    """

    gb_per_s: float
    efficiency: float
    launch_ms: float
    live_rows: float

    def seconds(self, shape: Mapping, itemsize: int, n_rows: int, mean_live: float) -> float:
        """Of a step of n_rows rows that hold mean_live tokens each."""
        moved = minimum_bytes(shape, n_rows, mean_live, itemsize)
        return self.launch_ms / 1000 + moved / (self.gb_per_s * 1e9 * self.efficiency)


def clock(seconds: float) -> str:
    """A time as a person reads it: 45 s, 2 min 52 s, 1 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
