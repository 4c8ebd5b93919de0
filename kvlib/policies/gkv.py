"""G-KV: attention of the last queries remembered across rounds, minus redundancy (arXiv 2512.00504)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.redundancy import redundancy
from kvlib.policies.base import Odd, Part, View
from kvlib.policies.observe import Observing, attention, keep_window, observe, pool

SCORE = "gkv_score"
SCORED = "gkv_scored"
Smooth = Literal["max", "mean", "sum", "none"]


@dataclass(frozen=True, kw_only=True)
class GKV(Observing):
    """Keep by `mix_lambda * F - (1 - mix_lambda) * redundancy`, and the newest n_recent tokens.

    F carries what a slot received over the rounds: the maximum, mean or sum (`smooth`) of decay * F and the round's
    attention, divided by its largest if `normalise`; "none" forgets. Attention is that of the last n_obs queries,
    group maximum of the probabilities, mean over queries. mix_lambda 1 leaves out the redundancy (that of R-KV).
    kernel: max-pooling along slots (1: none).

    Follows `ScoreBasedKV.update_kv` (microsoft/G-KV, gkv/model/compression/score_based.py) with the paper's settings:
    decay 0.8, lambda 0.5, window 16, no pooling, a round every 128 tokens. Its redundancy compares every batch row
    with row 0; here each row is compared with itself.
    """

    n_obs: int = 16
    mix_lambda: Part = 0.5
    decay: Part = 0.8
    smooth: Smooth = "max"
    normalise: bool = True
    kernel: Odd = 1
    threshold: float = 0.5
    n_recent: int = 16
    buffer: int | None = 128
    state_names = (SCORE, SCORED)
    shares = ("head",)

    def remembered(self, view: View, state: dict[str, Tensor]) -> Tensor:
        """F of the slots older than the window, `[L, R, H, N - n_obs]`. A newcomer starts from its own attention."""
        n_older = view.positions.shape[-1] - self.n_obs
        now = torch.stack([attention(*layer).amax(2).mean(-2)[..., :n_older] for layer in observe(view, self.n_obs)])
        if self.smooth == "none":
            return now
        if self.normalise:
            now = now / now.amax(-1, keepdim=True)
        newcomer = state[SCORED][..., :n_older] == 0
        before = state[SCORE][..., :n_older].to(now.dtype)
        if self.smooth == "sum":
            return self.decay * before + now
        before = torch.where(newcomer, now, before)
        if self.smooth == "mean":
            return self.decay * before + (1 - self.decay) * now
        return torch.maximum(self.decay * before, now)

    def score(self, view, state):
        score = self.remembered(view, state)
        state = {
            SCORE: F.pad(score.float(), (0, self.n_obs)),
            SCORED: F.pad(torch.ones_like(score, dtype=torch.float32), (0, self.n_obs)),
        }
        score = pool(score, self.kernel, "max")
        if self.mix_lambda < 1:
            repeated = redundancy(view.keys, self.threshold)[..., : -self.n_obs]
            if self.smooth != "none" and self.normalise:
                repeated = repeated / repeated.amax(-1, keepdim=True)
            score = self.mix_lambda * score - (1 - self.mix_lambda) * repeated
        return keep_window(score, self.n_obs), state
