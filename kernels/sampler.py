"""Sampling the next token: temperature, top-k, top-p, then a Gumbel maximum on counter-based noise."""

import torch
from torch import Tensor

from kvlib.kernels.noise import gumbel

HIGHEST = 22.9
"""Above any Gumbel noise: of 32 random bits, it ends at 33 ln 2."""
FEW = 4096
"""Logits a row. Of more, nearly all are too far below the largest to be drawn, and are not looked at one by one."""


def sample(logits: Tensor, request: Tensor, step: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Draw ids `[B]` int64 from logits `[B, V]`; request and step `[B]` int64 key the noise, nothing else changes it.

    Order and support are transformers': temperature, then top-k, then top-p (a token stays while the mass ranked
    above it is below top_p); of logits equal to the k-th, k stay in all. temperature 0 is greedy; top_k 0 and top_p 1
    switch the filters off.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if logits.device.type != "cpu":
        from kvlib.kernels.sampler_triton import LARGEST_TOP_K, sample_ids

        # Top-p of a whole vocabulary needs it sorted, which torch does.
        if 0 < top_k <= LARGEST_TOP_K or (not top_k and top_p == 1):
            return sample_ids(logits, request, step, temperature, top_p, top_k)
    V = logits.shape[-1]
    # Elsewhere than on a CPU, what is looked at must not depend on the logits: a step would wait for the device.
    many = V > FEW and not top_k and logits.device.type == "cpu"
    if many and top_p == 1:
        return _within_reach(logits, request, step, temperature)
    ids = torch.arange(V, device=logits.device).expand_as(logits)
    mass = (logits.double() / temperature).logsumexp(-1, keepdim=True) if many else None
    if top_k or top_p < 1:
        whole = logits
        logits, ids = whole.topk(FEW if many else min(top_k or V, V), -1)
        if many and ((logits.double() / temperature - mass).exp().sum(-1) < top_p).any():
            logits, ids = whole.sort(-1, descending=True)
    logits = logits.double() / temperature
    if top_p < 1:
        probabilities = (logits - (logits.logsumexp(-1, keepdim=True) if mass is None else mass)).exp()
        above = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(above >= top_p, -torch.inf)
    winner = (logits + gumbel(request[:, None], step[:, None], ids)).argmax(-1, keepdim=True)
    return ids.gather(-1, winner)[:, 0]


def _within_reach(logits: Tensor, request: Tensor, step: Tensor, temperature: float) -> Tensor:
    """What `sample` draws without filters, of the logits alone that the highest noise could bring to the top."""
    top, first = logits.max(-1)
    reached = top + temperature * gumbel(request, step, first)
    rows, ids = (logits >= (reached - temperature * HIGHEST)[:, None]).nonzero(as_tuple=True)
    noisy = logits[rows, ids].double() / temperature + gumbel(request[rows], step[rows], ids)
    best = noisy.new_full((len(logits),), -torch.inf).scatter_reduce(0, rows, noisy, "amax")
    won = noisy == best[rows]
    return torch.zeros_like(first).scatter_reduce(0, rows[won], ids[won], "amin", include_self=False)
