"""Sampling the next token: temperature, top-k, top-p, then a Gumbel maximum on counter-based noise."""

import torch
from torch import Tensor

from kvlib.kernels.noise import gumbel


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
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V), -1)
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    logits = logits.double() / temperature
    if top_p < 1:
        probabilities = logits.softmax(-1)
        above = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(above >= top_p, -torch.inf)
    winner = (logits + gumbel(request[:, None], step[:, None], ids)).argmax(-1, keepdim=True)
    return ids.gather(-1, winner)[:, 0]
