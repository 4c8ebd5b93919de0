"""TriAttention: attention of the average query from many future positions (arXiv 2604.04921)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kvlib.policies.base import Count, Policy, Share, View, wide


class QueryStatistics(nn.Module):
    """Per layer, query head and frequency, `[L, HQ, D / 2]`: the mean query before RoPE (complex), and mean |q|."""

    def __init__(self, mean_re: Tensor, mean_im: Tensor, mean_abs: Tensor):
        super().__init__()
        self.register_buffer("mean_re", mean_re)
        self.register_buffer("mean_im", mean_im)
        self.register_buffer("mean_abs", mean_abs)

    @property
    def shape(self) -> dict[str, str]:
        return {}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "QueryStatistics":
        return cls(**tensors)


def query_scores(view: View, calibration: QueryStatistics, max_offset: int, reduce: Literal["mean", "max"]) -> Tensor:
    """Score of each slot for each query head `[L, R, H, G, N]`, from 1, 2, 4, ... max_offset positions ahead.

    The published sum over frequencies, `|q||k| cos(w (n - p + d) + arg q - arg k)` and `(E|q| - |q|) |k|` with k
    before RoPE, equals `Re (q e^(iw (n + d)) conj(k))` with k as cached, so no key is rotated back.
    """
    keys = wide(view.keys)
    L, _, H, _, D = keys.shape
    mean_abs = calibration.mean_abs.to(keys.dtype).view(L, 1, H, -1, D // 2)
    re, im = (x.double().view(L, 1, H, -1, D // 2) for x in (calibration.mean_re, calibration.mean_im))
    offsets = 2 ** torch.arange(max_offset.bit_length(), device=keys.device)
    phase = (view.n_seen[:, None] + offsets).double()[..., None] * view.inv_freq.double()
    cos, sin = phase.cos(), phase.sin()
    if reduce == "mean":
        cos, sin = cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)
    scores = None
    for c, s in zip(cos.unbind(1), sin.unbind(1), strict=True):
        c, s = c[:, None, None], s[:, None, None]
        query = torch.cat([re * c - im * s, re * s + im * c], -1).to(keys.dtype)
        attended = query @ keys.transpose(-1, -2)
        scores = attended if scores is None else torch.maximum(scores, attended)
    first, second = keys.chunk(2, -1)
    excess = mean_abs - torch.hypot(re, im).to(keys.dtype)
    return scores + excess @ torch.hypot(first, second).transpose(-1, -2)


def standardise(scores: Tensor, excluded: Tensor) -> Tensor:
    """z-scores over the slots that are not excluded; those get 0."""
    rest = (~excluded).to(scores.dtype)
    n = rest.sum(-1, keepdim=True).clamp(min=1)
    centred = (scores - (scores * rest).sum(-1, keepdim=True) / n) * rest
    return centred / (centred.square().sum(-1, keepdim=True) / n).sqrt().clamp(min=1e-6)


@dataclass(frozen=True, kw_only=True)
class TriAttention(Policy):
    """Keep the prompt, and what the calibrated mean query attends to from 1 to 2^16 positions ahead.

    Scores are standardised per query head over the slots that are not prompt, and the best of a group counts.
    `TriAttention.compute_keep_indices` (WeianMao/triattention, pruning_utils.py), a round every 128 tokens. share is
    its mode: "head_across_layers" is `per_head`, "head" is `per_layer_per_head`, "model" is `union` (the best of
    all heads and layers: what ranks in the first n of all also ranks in the first n of its head). With
    protect_prompt=False, its vLLM default, the prompt is ranked like the rest.

    calibration: query statistics, or the path of their file; None: the file beside the model's weights.
    """

    protect_prompt: bool = True
    buffer: int | None = 128
    share: Share = "head_across_layers"
    normalise: bool = True
    group_reduce: Literal["max", "mean"] = "max"
    max_offset: Count = 2**16
    offset_reduce: Literal["mean", "max"] = "mean"
    calibration: QueryStatistics | str | None = None
    needs = ("calibration",)
    shares = ("head", "head_across_layers", "model")
    reads_rope = True

    def score(self, view, state):
        scores = query_scores(view, self.calibration, self.max_offset, self.offset_reduce)
        if self.normalise:
            excluded = view.is_prompt if self.protect_prompt else torch.zeros_like(view.positions, dtype=torch.bool)
            scores = standardise(scores, excluded[:, :, :, None])
        if self.share == "model":
            return scores.amax((0, 2, 3))[None, :, None], state
        return (scores.amax(3) if self.group_reduce == "max" else scores.mean(3)), state
