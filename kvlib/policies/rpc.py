"""RPC: reasoning path compression, a cache that grows with a share of the output (arXiv 2505.13866)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.policies.base import Count, Odd, Share
from kvlib.policies.observe import Observing, Pooling, attention, keep_window, observe, pool


@dataclass(frozen=True, kw_only=True)
class RPC(Observing):
    """Every `interval` tokens, keep the prompt, the newest n_obs tokens and 1 of `compression` tokens between.

    Follows `RPCCluster.compress_kv` (jiwonsong-dev/ReasoningPathCompression, rpc/rpc_utils.py; P = interval,
    R = n_obs, c = compression, T = int(P / c)): round m = 0, 1, ... comes when the prompt and P + R + m * T slots are
    held, and leaves the prompt, the newest R and the (m + 1) * T between them that the last R queries attend to most:
    softmax over the slots between, pooled along slots by their mean or maximum. share="layer" is its aggregation
    'all', "head" its 'group'; its third, 'none', raises an error there.

    The original has no bound. Here kv_budget is one: where the growth would pass it, a round comes at kv_budget and
    leaves kv_budget - buffer. last_query_twice: the released Qwen2 model file passes the newest query twice, in place
    of the oldest of the R.
    """

    interval: Count = 1024
    compression: int = 4
    kernel: Odd = 7
    pooling: Pooling = "avg"
    last_query_twice: bool = False
    protect_prompt: bool = True
    n_recent: int = 32
    buffer: int | None = 128
    share: Share = "layer"

    def __post_init__(self):
        super().__post_init__()
        self.require(
            1 <= self.compression <= self.interval,
            f"compression is {self.compression}; use 1 to interval={self.interval}",
        )

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        first = self.n_obs if n_held == n_prompt else 0
        return min(kv_budget, n_held + first + self.interval - 1)

    def keep(self, kv_budget: int, n_prompt: int, n_seen: int) -> int:
        done, early = divmod(n_seen - n_prompt - self.n_obs, self.interval)
        per_round = int(self.interval / self.compression)
        grown = n_prompt + self.n_obs + done * per_round
        as_published = done >= 1 and not early and grown - per_round + self.interval <= kv_budget + 1
        if not as_published:
            return kv_budget - self.buffer
        return min(kv_budget - self.buffer, max(grown, len(self.protected(kv_budget, n_prompt, n_seen))))

    def score(self, view, state):
        n_older = view.positions.shape[-1] - self.n_obs

        def paid(logits: Tensor, visible: Tensor) -> Tensor:
            by_query = attention(logits[..., :n_older], visible[..., :n_older])
            if self.last_query_twice:
                by_query = torch.cat([by_query[..., 1:, :], by_query[..., -1:, :]], -2)
            return by_query.sum(-2).mean(2)

        importance = torch.stack([paid(*layer) for layer in observe(view, self.n_obs, among=~view.is_prompt)])
        if self.share == "layer":  # before pooling, with whose maximum it does not commute
            importance = importance.mean(2, keepdim=True)
        return keep_window(pool(importance, self.kernel, self.pooling), self.n_obs), state
