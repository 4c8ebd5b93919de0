"""CUR: leverage scores of keys and values (arXiv 2509.15038)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.noise import uniform
from kvlib.policies.base import Policy, View, Whole, wide

Leverage = Literal["kv_product", "kv_avg", "key", "value"]
N_COLUMNS = 20


def share_of_window(x: Tensor, size: int) -> Tensor:
    """Each of `x [..., N]` as its share of its window of `size` slots; the last window may be short."""
    N = x.shape[-1]
    windows = F.pad(x, (0, -N % size)).unflatten(-1, (-1, size))
    return (windows / windows.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)).flatten(-2)[..., :N]


@dataclass(frozen=True, kw_only=True)
class CUR(Policy):
    """Keep the slots of largest `|k|^2 |v|^2`, each norm taken as its share of its window of local_window slots.

    `CURPress.score` (NVIDIA/kvpress) with its defaults: windows of 16, sinks 4. local_window 0 takes norms as they are.
    leverage: the product, the average, or one of the two. resample: norms after a Gaussian projection to 20 columns,
    drawn afresh each round (`cur_resample_gauss` of terarachang/VaSE, which beats a fixed one). Windows are cut in
    position order; kvpress' decoding cuts them out of slots that its first round left unordered.
    """

    n_sink: int = 4
    buffer: int | None = 128
    local_window: Whole = 16
    leverage: Leverage = "kv_product"
    resample: bool = False

    def projection(self, view: View) -> Tensor:
        """`[L, R, H, D, 20]` of variance 1 / 20, keyed by request, round, layer and head."""
        L, _, H, _, D = view.keys.shape
        device = view.keys.device
        drawn = uniform(
            view.noise_key[None, :, None, None, None],
            view.n_seen[None, :, None, None, None],
            torch.arange(L, device=device)[:, None, None, None, None],
            view.heads(H)[None, None, :, None, None],
            torch.arange(D, device=device)[:, None],
            torch.arange(N_COLUMNS, device=device),
        )
        return torch.special.ndtri(drawn) / N_COLUMNS**0.5

    def score(self, view, state):
        keys, values = wide(view.keys), wide(view.values)
        if self.resample:
            projection = self.projection(view).to(keys.dtype)
            keys, values = keys @ projection, values @ projection
        of_keys, of_values = keys.square().sum(-1), values.square().sum(-1)
        if self.local_window:
            of_keys, of_values = (share_of_window(x, self.local_window) for x in (of_keys, of_values))
        scores = {
            "kv_product": of_keys * of_values,
            "kv_avg": (of_keys + of_values) / 2,
            "key": of_keys,
            "value": of_values,
        }[self.leverage]
        return scores / scores.sum(-1, keepdim=True), state
