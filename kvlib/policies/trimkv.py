"""TRIM-KV: each token's retention is learned and decays with age (arXiv 2512.03324)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.policies.base import Policy

LOG_BETA = "log_beta"


@dataclass(frozen=True, kw_only=True)
class TrimKV(Policy):
    """Keep the slots of largest `beta^age`, beta in (0, 1) given by a gate when the token is made, per KV head.

    `TrimKVCache.compress_layer` (ngocbh/trimkv): `age * log beta`, where the newest has age 2; use_knorm adds
    `log |k|` (its `knorm_alpha`); a round every 512 tokens. The published gates read each layer's own input and are
    trained with the whole model's loss; those of `kvlib.train.gate` read the last hidden state.

    gate: log beta `[L, B, H]` from the last hidden state `[B, d]` (after the final norm), or the path of its file;
    None: the file beside the model's weights.
    """

    buffer: int | None = 512
    use_knorm: bool = False
    gate: Callable[[Tensor], Tensor] | str | None = None
    state_names: ClassVar[tuple[str, ...]] = (LOG_BETA,)
    needs: ClassVar[tuple[str, ...]] = ("gate",)

    def __post_init__(self):
        super().__post_init__()
        self.require(self.share == "head", f"share is {self.share!r}; retention is kept per head, use 'head'")

    def creation_score(self, hidden, token_ids, answering):
        return {LOG_BETA: self.gate(hidden).float()}

    def score(self, view, state):
        score = state[LOG_BETA] * (view.n_seen[None, :, None, None] + 1 - view.positions)
        if self.use_knorm:
            score = score + view.keys.norm(dim=-1, dtype=torch.promote_types(view.keys.dtype, torch.float32)).log()
        return score, state
