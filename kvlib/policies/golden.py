"""Golden eviction: keep what a recorded trace attends to later, knowing the future (arXiv 2602.03203)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    reads_heads: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        self.require(self.attention is not None, "attention is missing; give the recorded probabilities [L, H, T, T]")
        self.require(self.reduce in ("sum", "block"), f"reduce is {self.reduce!r}; use 'sum' or 'block'")
        self.require(self.block >= 1, f"block is {self.block}; use 1 or more queries")

    def future(self, step: Tensor) -> Tensor:
        """`[L, R, H, T]`: what each token receives from the queries from position step `[R]` on."""
        T = self.attention.shape[2]
        query = torch.arange(T, device=step.device)
        later = (query >= step[:, None]).to(self.attention.dtype)
        if self.reduce == "sum":
            return torch.einsum("rq,lhqk->lrhk", later, self.attention)
        blocks = [
            torch.einsum("rq,lhqk->lrhk", later * self._in_block(query, step, i), self.attention)
            for i in range(-(-T // self.block))
        ]
        return torch.stack(blocks).amax(0)

    def _in_block(self, query: Tensor, step: Tensor, i: int) -> Tensor:
        """0 or 1 `[R, T]`: whether a query is in the i-th block after step."""
        return ((query - step[:, None]).div(self.block, rounding_mode="floor") == i).to(self.attention.dtype)

    def score(self, view, state):
        future = self.future(view.n_seen)
        return future.gather(-1, view.positions.long().expand(*future.shape[:3], -1)), state
