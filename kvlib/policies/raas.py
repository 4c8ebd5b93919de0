"""RaaS: evict what has not been attended to for longest (arXiv 2502.11147)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.policies.observe import Hits, attention, decoded, observe, query_positions

STAMP = "stamp"


@dataclass(frozen=True, kw_only=True)
class RaaS(Hits):
    """Keep the prompt and the slots with the newest timestamp: the position of the last decoded query that hit it.

    A query hits the slots to which it pays alpha or more and, with top_half, the half of the slots to which it pays
    most. A slot's first timestamp is its own position. Of the paper's formula, for tokens instead of pages: no
    official code was run; a group's heads are reduced by their maximum.
    """

    top_half: bool = False
    protect_prompt: bool = True
    state_names = (STAMP,)

    def score(self, view, state):
        def newest_hit(logits: Tensor, visible: Tensor) -> Tensor:
            W = logits.shape[-2]
            paid = attention(logits, visible).amax(2)
            hit = paid >= self.alpha
            if self.top_half:
                half = (visible[:, :, 0].sum(-1, keepdim=True) + 1) // 2
                least = paid.sort(-1, descending=True).values.gather(-1, half.expand(*paid.shape[:-1], 1) - 1)
                hit |= visible[:, :, 0] & (paid >= least)
            hit &= decoded(view, W)[:, None, :, None]
            return torch.where(hit, query_positions(view, W)[:, None, :, None], -1).amax(-2)

        hit_at = torch.stack([newest_hit(*layer) for layer in observe(view, self.n_queries)]).float()
        stamp = torch.maximum(torch.maximum(state[STAMP], view.positions.float()), hit_at)
        return stamp, {STAMP: stamp}
