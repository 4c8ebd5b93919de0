"""Statistics of a model's queries before RoPE, for TriAttention (arXiv 2604.04921), from teacher-forced tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvlib.engine.attention import observe_trace
from kvlib.errors import ConfigError
from kvlib.kernels.rope import rotate
from kvlib.policies.triattention import QueryStatistics


def query_statistics(model: nn.Module, traces: Sequence[Sequence[int]]) -> QueryStatistics:
    """Statistics over all tokens of the traces, given as ids; accumulated in float64.

    Raises ConfigError for a model without one RoPE for all layers.
    """
    config, inv_freq = model.config, getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    if inv_freq is None:
        raise ConfigError(
            f"triattention reads queries before RoPE, and a {config.model_type} model has no one RoPE for all layers; "
            "use another policy"
        )
    shape = (3, config.num_hidden_layers, config.num_attention_heads, len(inv_freq))
    total = torch.zeros(shape, dtype=torch.float64, device=inv_freq.device)

    def accumulate(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        position = torch.arange(query.shape[1], device=query.device)
        re, im = rotate(query.double(), -position, inv_freq).chunk(2, -1)
        total[:, layer] += torch.stack([re, im, torch.hypot(re, im)]).sum(2)

    for ids in traces:
        observe_trace(model, ids, accumulate)
    return QueryStatistics(*(total / sum(map(len, traces))).float())
