"""SnapKV at decode time: attention of the last queries (arXiv 2404.14469)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.policies.base import Policy, View


def observed_importance(view: View, n_obs: int, kernel: int) -> Tensor:
    """Pooled attention that the last n_obs queries pay to the older slots: `[L, R, H, N - n_obs]`.

    Group maximum of the logits, softmax over slots outside the window, mean over queries, max-pooling along
    slots (`R1KV.update_kv` and `SnapKV.update_kv`, Zefan-Cai/R-KV, rkv/compression).
    """
    keys = view.keys[..., :-n_obs, :]
    queries = view.queries[..., -n_obs:, :]
    L, R, H, N, D = keys.shape
    logits = queries.reshape(L, R, H, -1, D) @ keys.transpose(-1, -2) * view.scaling
    logits = logits.view(L, R, H, -1, queries.shape[3], N).amax(3)
    wide = torch.promote_types(logits.dtype, torch.float32)
    importance = logits.to(wide).softmax(-1).mean(-2)
    return F.max_pool1d(importance.flatten(0, 2), kernel, stride=1, padding=kernel // 2).view(L, R, H, N)


def keep_window(scores: Tensor, n_obs: int) -> Tensor:
    """Append +inf for the observing window, which the original never ranks."""
    return F.pad(scores, (0, n_obs), value=torch.inf)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep what the last n_obs queries attend to, and the newest n_recent tokens.

    The decode-time variant of Zefan-Cai/R-KV (rkv/compression/snapkv.py): its window of 8 observes and stays,
    kernel 7, a round every 128 tokens.
    """

    n_obs: int = 8
    kernel: int = 7
    n_recent: int = 8
    buffer: int | None = 128

    def __post_init__(self):
        super().__post_init__()
        self.require(self.n_obs >= 1, f"n_obs is {self.n_obs}; use 1 or more queries")
        self.require(self.kernel % 2 == 1, f"kernel is {self.kernel}; use an odd number of slots")

    @property
    def n_queries(self) -> int:
        return self.n_obs

    def score(self, view, state):
        return keep_window(observed_importance(view, self.n_obs, self.kernel), self.n_obs), state
