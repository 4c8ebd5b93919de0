"""SnapKV at decode time: attention of the last queries (arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvlib.policies.base import Odd, View
from kvlib.policies.observe import Observing, Pooling, attention, keep_window, observe, pool

Group = Literal["logit_max", "mean", "max"]
Domain = Literal["older", "all"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Observing):
    """Keep what the last n_obs queries attend to, and the newest n_recent tokens.

    The published variants are settings. kernel: neighbouring slots pooled, by their "max" or "avg" (1: none).
    group: how the query heads of a KV head become one, the maximum of their logits before the softmax, or the mean or
    maximum of their probabilities summed over the queries. domain: softmax over the slots older than the n_obs newest,
    or over "all" that a query could see.

    The defaults are the decode-time variant of Zefan-Cai/R-KV (rkv/compression/snapkv.py): its window of 8 observes
    and stays, max-pooling 7, a round every 128 tokens. FasterDecoding/SnapKV (snapkv_utils.py) and NVIDIA/kvpress use
    kernel 5, "avg", domain "all"; terarachang/VaSE the same with "older". FasterDecoding ranks per query head, which
    this does where each KV head has one; Zefan-Cai/KVCache-Factory reduces the group by "mean" or "max" (its "sum" is
    the mean times a constant), kvpress and VaSE by "mean".
    """

    n_obs: int = 8
    kernel: Odd = 7
    pooling: Pooling = "max"
    group: Group = "logit_max"
    domain: Domain = "older"
    n_recent: int = 8
    buffer: int | None = 128

    def importance(self, view: View) -> Tensor:
        """Pooled attention of the last n_obs queries to the slots older than the window: `[L, R, H, N - n_obs]`."""
        n_older = view.positions.shape[-1] - self.n_obs

        def paid(logits: Tensor, visible: Tensor) -> Tensor:
            if self.group == "logit_max":
                logits = logits.amax(2, keepdim=True)
            if self.domain == "older":
                logits, visible = logits[..., :n_older], visible[..., :n_older]
            by_head = attention(logits, visible).mean(-2)[..., :n_older]
            return by_head.mean(2) if self.group == "mean" else by_head.amax(2)

        importance = torch.stack([paid(*layer) for layer in observe(view, self.n_obs)])
        return pool(importance, self.kernel, self.pooling)

    def score(self, view, state):
        return keep_window(self.importance(view), self.n_obs), state
