"""Expected Attention: what queries like the last ones will pay to a slot from later positions (arXiv 2510.00636)."""

from dataclasses import dataclass
from numbers import Real
from typing import Annotated

import torch

from kvlib.kernels.rope import rotate
from kvlib.policies.base import Count, wide
from kvlib.policies.observe import Observing


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Observing):
    """Keep by the expected attention of the next n_future queries, times the value's norm.

    Future queries are normal, with the mean and covariance of the last n_obs queries before RoPE, at the average
    RoPE of the next n_future positions. `ExpectedAttentionPress.score` (NVIDIA/kvpress) and its defaults; n_obs and
    the defaults of its DecodingPress: 256 queries, of which it takes the number for the position of the newest
    token. Here positions are true. The sinks take no part in the softmax and stay.
    """

    n_sink: int = 4
    n_obs: int = 256
    buffer: int | None = 512
    n_future: Count = 512
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: Annotated[float, "0 or more", lambda x: isinstance(x, Real) and x >= 0] = 0.0
    reads_rope = True

    def score(self, view, state):
        keys, queries = wide(view.keys), wide(view.queries[..., -self.n_obs :, :])
        L, R, H, _, D = keys.shape
        ago = torch.arange(self.n_obs, 0, -1, device=keys.device)
        queries = rotate(queries, -(view.n_seen[:, None, None] - ago), view.inv_freq)
        ahead = torch.arange(self.n_future, device=keys.device)
        phase = (view.n_seen[:, None] + ahead).double()[..., None] * view.inv_freq.double()
        cos, sin = (mean.to(keys.dtype)[:, None, None] for mean in (phase.cos().mean(1), phase.sin().mean(1)))
        first, second = queries.chunk(2, -1)
        queries = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        mean = queries.mean(-2)
        logits = mean.view(L, R, H, -1, D) @ keys.transpose(-1, -2) * view.scaling
        if self.use_covariance:
            centred = queries - mean[..., None, :]
            covariance = (centred.transpose(-1, -2) @ centred / self.n_obs).view(L, R, H, -1, D, D)
            # By layer: all at once would take more memory than the cache.
            spread = [(k @ c * k).sum(-1) for k, c in zip(keys[:, :, :, None], covariance, strict=True)]
            logits = logits + torch.stack(spread) * view.scaling**2 / 2
        sinks = view.positions < self.n_sink
        scores = logits.masked_fill(sinks[:, :, :, None], -torch.inf).softmax(-1).mean(3)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * wide(view.values).norm(dim=-1)
        return scores, state
