"""Golden eviction: keep what a recorded trace attends to later, knowing the future (arXiv 2602.03203)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Golden(Policy):
    """Keep the slots that the full-cache trace attends to most after the round; for replaying that trace only.

    attention: `[L, H, T, T]` attention probabilities of the trace, summed over the group; row = query, column = key.
    What counts is the sum over all later queries: in one round no keep set of the same size can exceed it; over many
    rounds it is greedy, and so a reference rather than a bound.
    """

    attention: Tensor | None = None
    reads_heads = False

    def __post_init__(self):
        super().__post_init__()
        self.require(self.attention is not None, "attention is missing; give the recorded probabilities [L, H, T, T]")

    def score(self, view, state):
        query = torch.arange(self.attention.shape[2], device=view.n_seen.device)
        later = (query >= view.n_seen[:, None]).to(self.attention.dtype)
        future = torch.einsum("rq,lhqk->lrhk", later, self.attention)
        return future.gather(-1, view.positions.long().expand(*future.shape[:3], -1)), state
