"""LazyEviction: tokens recur, evict those overdue (arXiv 2506.15969)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.policies.base import View
from kvlib.policies.observe import Hits, attention, decoded, observe, query_positions

LAST_HIT = "last_hit"
LONGEST_GAP = "longest_gap"


@dataclass(frozen=True, kw_only=True)
class LazyEviction(Hits):
    """Evict slots not attended to for longer than their longest pause so far; keep the newest n_recent tokens.

    A slot is hit when a decoded query pays it alpha or more; it is judged by the steps since its last hit and by the
    longest gap between two hits. Rounds come every buffer + 1 tokens from the first decoded one on (at first they
    evict nothing) and read the hits from the interval's queries, so that none is missed.

    Follows `Window_LAZYKVCluster.update_kv_in_decoding` (WeianMao/triattention 27b20d34, LazyEviction/model), whose
    score has a `1 +` that the paper's lacks; settings for R1-Distill-Qwen-7B on MATH. Two deviations: it keeps
    timestamps in float16, which past 2048 steps are wrong; and it expands the cache to rank per query head, where here
    the query head of a group that pays most hits, the same when each KV head has one.
    """

    n_recent: int = 175
    buffer: int | None = 174
    state_names = (LAST_HIT, LONGEST_GAP)

    def hits(self, view: View, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new state. Steps count from the first decoded token, 1; a slot starts as hit one step before its own."""
        first = (view.positions - view.n_prompt[None, :, None, None]).clamp(min=0)
        before = torch.maximum(state[LAST_HIT], first.float())
        last, longest = [], []
        for (logits, visible), known in zip(observe(view, self.n_queries), before, strict=True):
            W = logits.shape[-2]
            hit = attention(logits, visible).amax(2) >= self.alpha
            hit &= decoded(view, W)[:, None, :, None]
            step = (query_positions(view, W) - view.n_prompt[:, None] + 1).float()[:, None, :, None]
            hit_at = torch.where(hit, step, 0.0)
            latest = torch.cat([known[..., None, :], hit_at], -2).cummax(-2).values
            last.append(latest[..., -1, :])
            longest.append(torch.where(hit, step - latest[..., :-1, :], 0.0).amax(-2))
        return {LAST_HIT: torch.stack(last), LONGEST_GAP: torch.maximum(state[LONGEST_GAP], torch.stack(longest))}

    def score(self, view, state):
        state = self.hits(view, state)
        gap = state[LONGEST_GAP]
        since = (view.n_seen - view.n_prompt)[None, :, None, None] - state[LAST_HIT]
        overdue = 2 * (-(1 + since / (gap + 1e-5))).sigmoid()
        return overdue + torch.where(gap > 0, 2 * (1 - gap).sigmoid(), 0.0), state
