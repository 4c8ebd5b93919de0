"""Golden eviction: keep what a recorded trace attends to later, knowing the future (arXiv 2602.03203)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvlib.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Golden(Policy):
    """Keep the slots that the full-cache trace attends to most after the round; for replaying that trace only.

    attention: `[L, H, T, T]` attention probabilities of the trace, summed over the group; row = query, column = key.
    reduce: "sum" of all later queries: in one round no keep set of the same size can exceed it; over many rounds it is
    greedy, and so a reference rather than a bound. Or, as the labels of ForesightKV, the largest sum of a "block" of
    `block` later queries.
    """

    attention: Tensor | None = None
    reduce: Literal["sum", "block"] = "sum"
    block: int = 128

    def __post_init__(self):
        super().__post_init__()
        self.require(self.attention is not None, "attention is missing; give the recorded probabilities [L, H, T, T]")
        self.require(self.reduce in ("sum", "block"), f"reduce is {self.reduce!r}; use 'sum' or 'block'")
        self.require(self.block >= 1, f"block is {self.block}; use 1 or more queries")

    def future(self, step: int) -> Tensor:
        """`[L, H, T]`: what each token receives from the queries from position `step` on."""
        later = self.attention[:, :, step:]
        if self.reduce == "sum" or later.shape[2] == 0:
            return later.sum(2)
        return torch.stack([block.sum(2) for block in later.split(self.block, 2)]).amax(0)

    def score(self, view, state):
        future = torch.stack([self.future(step) for step in view.step.tolist()], 1)
        L, R, H, _ = future.shape
        return future.gather(-1, view.positions.long().expand(L, R, H, -1)), state
