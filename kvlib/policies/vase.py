"""VaSE: keep the large value ranges, draw the rest by attention (arXiv 2606.03928)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvlib.policies.base import Part, wide
from kvlib.policies.observe import Pooling, keep_window
from kvlib.policies.snapkv import Group, SnapKV

Magnitude = Literal["range", "variance", "l2"]


def value_magnitude(values: Tensor, kind: Magnitude) -> Tensor:
    """`[..., D]` -> `[...]`."""
    values = wide(values)
    if kind == "range":
        return values.amax(-1) - values.amin(-1)
    return values.var(-1) if kind == "variance" else values.norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class VaSE(SnapKV):
    """Keep the share `large` of the kept slots whose values are largest (sinks count as such), draw the others.

    Draws are without replacement, in proportion to SnapKV's importance; with draw=False the most important stay.
    `EvictLayer._run_eviction` (terarachang/VaSE), mode `range_sink_sample_attn`: a quarter by value range, sinks 4,
    64 queries that stay too, kernel 5, a round every 64 tokens. Its `attn` is large=0, draw=False, n_sink=0;
    `range_attn` is draw=False, n_sink=0. Sorted by position here; the original leaves its slots unordered, and its
    pooling mixes them.
    """

    n_sink: int = 4
    n_obs: int = 64
    n_recent: int = 64
    buffer: int | None = 64
    kernel: int = 5
    pooling: Pooling = "avg"
    group: Group = "mean"
    large: Part = 0.25
    magnitude: Magnitude = "range"
    draw: bool = True
    shares = ("head",)

    def score(self, view, state):
        scores, older = self.importance(view), slice(0, -self.n_obs)
        if self.draw:
            # The k largest of weight / Exp(1) are k draws without replacement in proportion to the weights.
            scores = (scores / -view.uniform()[..., older].log()).to(scores.dtype)
        magnitude = value_magnitude(view.values[..., older, :], self.magnitude)
        magnitude = magnitude.masked_fill(view.positions[..., older] < self.n_sink, torch.inf)
        rank = magnitude.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        n_large = (self.large * view.n_keep).round()[None, :, None, None]
        return keep_window(scores.masked_fill(rank < n_large, torch.inf), self.n_obs), state
