"""TRIM-KV: each token's retention is learned and decays with age (arXiv 2512.03324)."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from kvlib.policies.base import Policy, wide

LOG_BETA = "log_beta"
FIRST_BIAS = 5.0
"""Before training, beta is sigmoid(5): half of a token is retained after about a hundred tokens."""


class RetentionGate(nn.Module):
    """log beta of each token for every layer and KV head, from the last hidden state; trained by `kvlib.train`."""

    def __init__(self, d: int, n_layers: int, n_kv_heads: int):
        super().__init__()
        self.n_layers = n_layers
        self.layers = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, n_layers * n_kv_heads))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.constant_(self.layers[2].bias, FIRST_BIAS)

    @property
    def shape(self) -> dict[str, str]:
        """What `of` must know besides the tensors."""
        last = self.layers[2]
        return {"shape": json.dumps([last.in_features, self.n_layers, last.out_features // self.n_layers])}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "RetentionGate":
        gate = cls(*json.loads(metadata["shape"]))
        gate.load_state_dict(tensors)
        return gate

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, d]` -> `[L, T, H]`."""
        logits = self.layers(hidden.to(self.layers[0].weight.dtype))
        return F.logsigmoid(logits).unflatten(-1, (self.n_layers, -1)).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class TrimKV(Policy):
    """Keep the slots of largest `beta^age`, beta in (0, 1) given by a gate when the token is made, per KV head.

    `TrimKVCache.compress_layer` (ngocbh/trimkv): `age * log beta`, where the newest has age 2; use_knorm adds
    `log |k|` (its `knorm_alpha`); a round every 512 tokens. The published gates read each layer's own input and are
    trained with the whole model's loss; `RetentionGate` reads the last hidden state.

    gate: log beta `[L, B, H]` from the last hidden state `[B, d]` (after the final norm), or the path of its file;
    None: the file beside the model's weights.
    """

    buffer: int | None = 512
    use_knorm: bool = False
    gate: Callable[[Tensor], Tensor] | str | None = None
    state_names = (LOG_BETA,)
    needs = ("gate",)
    shares = ("head",)

    def creation_score(self, hidden, token_ids, answering):
        return {LOG_BETA: self.gate(hidden).float()}

    def score(self, view, state):
        score = state[LOG_BETA] * (view.n_seen[None, :, None, None] + 1 - view.positions)
        if self.use_knorm:
            score = score + wide(view.keys).norm(dim=-1).log()
        return score, state
