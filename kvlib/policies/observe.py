"""What the last queries attend to among the slots that are held: shared by the policies that score by attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.policies.base import Count, Policy, SomePart, View, wide

Pooling = Literal["max", "avg"]


@dataclass(frozen=True, kw_only=True)
class Observing(Policy):
    """n_obs: how many of the last queries `score` reads."""

    n_obs: Count = 32

    @property
    def n_queries(self) -> int:
        return self.n_obs


@dataclass(frozen=True, kw_only=True)
class Hits(Policy):
    """Settings and rhythm of a policy that remembers hits per KV head.

    A round comes every buffer + 1 tokens from the first decoded one on, and keeps all while they fit, so that the ring
    of buffer + 1 queries misses none.
    """

    alpha: SomePart = 1e-4
    shares = ("head",)

    @property
    def n_queries(self) -> int:
        return self.buffer + 1

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        return min(kv_budget, n_held + self.buffer)


def query_positions(view: View, n_queries: int) -> Tensor:
    """Positions `[R, W]` of the last W queries, oldest first."""
    return view.n_seen[:, None] + torch.arange(-n_queries, 0, device=view.n_seen.device)


def decoded(view: View, n_queries: int) -> Tensor:
    """Bool `[R, W]`: which of the last W queries are of decoded tokens, not of the prompt."""
    return query_positions(view, n_queries) >= view.n_prompt[:, None]


def observe(view: View, n_obs: int, among: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, visible) of each layer in turn: what the last W <= n_obs queries, oldest first, ask of all slots.

    logits `[R, H, G, W, N]`, at least float32: scaled q.k; visible, bool `[R, H or 1, 1, W, N]`: keys not newer than
    the query, and in `among [L or 1, R, H or 1, N]` if that is given. One layer at a time, because the logits of a
    long interval in all layers at once would outgrow the cache.
    """
    queries, keys = view.queries[..., -n_obs:, :], view.keys
    H = keys.shape[2]
    asked = query_positions(view, queries.shape[3])[:, None, None, :, None]
    visible = view.positions[:, :, :, None, None] <= asked
    if among is not None:
        visible = visible & among[:, :, :, None, None]
    for asking, held, seen in zip(queries, keys, visible.expand(len(keys), *visible.shape[1:]), strict=True):
        grouped = wide(asking).unflatten(1, (H, -1))
        logits = grouped.flatten(2, 3) @ wide(held).mT * view.scaling
        yield logits.unflatten(2, grouped.shape[2:4]), seen


def attention(logits: Tensor, visible: Tensor) -> Tensor:
    """Probabilities over the visible slots, 0 elsewhere."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0.0)


def pool(scores: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Maximum or mean over `kernel` neighbouring slots of `[..., N]`, N kept; at the borders the mean counts zeros."""
    flat = scores.flatten(0, -2)
    if pooling == "max":
        pooled = F.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    else:
        pooled = F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    return pooled.view_as(scores)


def keep_window(scores: Tensor, n_obs: int) -> Tensor:
    """Append +inf for the n_obs observing slots, which the originals never rank."""
    return F.pad(scores, (0, n_obs), value=torch.inf)
