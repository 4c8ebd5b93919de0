"""LagKV: how unusual a token's channels are on the scale of the next lag of tokens (arXiv 2504.04704)."""

from dataclasses import dataclass
from numbers import Integral
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.policies.base import Policy, wide


def lag_scores(x: Tensor) -> Tensor:
    """Lags `[..., P, S, D]` -> `[..., P - 1, S]`: softmax in the lag of the std over channels.

    A lag is scaled, per channel, by the minimum and maximum of the next one; a channel that is constant there is
    only shifted, where the original divides by zero.
    """
    reference = x[..., 1:, :, :]
    low, high = reference.amin(-2, keepdim=True), reference.amax(-2, keepdim=True)
    scale = torch.where(high > low, high - low, 1)
    return ((x[..., :-1, :, :] - low) / scale).std(-1).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keep what stands out among its lag of lag_size slots, in keys and values alike; the last full lag stays.

    `LagKVPress.score` (NVIDIA/kvpress) with its defaults, at each round on the survivors: ranks in a lag, so that
    every lag gives up the same share; with cross_scoring, the scores themselves. kvpress' decoding cuts lags out of
    slots that its first round left unordered; here they are in position order.
    """

    n_sink: int = 4
    lag_size: Annotated[int, "2 or more slots", lambda x: isinstance(x, Integral) and x >= 2] = 128
    cross_scoring: bool = False
    buffer: int | None = 128

    def score(self, view, state):
        L, R, H, N, D = view.keys.shape
        keys, values = wide(view.keys), wide(view.values)
        n_lags = (N - self.n_sink) // self.lag_size
        if n_lags < 2:
            order = torch.arange(N, device=view.keys.device, dtype=keys.dtype) - self.n_sink
            return torch.where(order < 0, 1, order / max(1, N - self.n_sink)).expand(1, R, 1, N), state
        lags = slice(self.n_sink, self.n_sink + n_lags * self.lag_size)
        keys, values = (x[..., lags, :].reshape(L, R, H, n_lags, self.lag_size, D) for x in (keys, values))
        scores = (lag_scores(keys) + lag_scores(values)) / 2
        if not self.cross_scoring:
            scores = scores.argsort(dim=-1, stable=True).argsort(-1).to(keys.dtype) / self.lag_size
        scores = scores.flatten(-2)
        return F.pad(scores, (self.n_sink, N - self.n_sink - scores.shape[-1]), value=1), state
