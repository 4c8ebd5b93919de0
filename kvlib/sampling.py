"""Sampling on the device from temperature, top-p and top-k, with counter-based noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib import noise


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 and top_k 0 switch the filters off."""

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0

    def __call__(self, logits: Tensor, request: Tensor, step: Tensor) -> Tensor:
        """Draw ids `[B]` from logits `[B, V]`; request and step `[B]` key the noise, so nothing else changes a draw.

        Order and support are transformers': temperature, then top-k, then top-p (a token stays while the mass ranked
        above it is below top_p). The draw is a Gumbel maximum, so equal keys give common random numbers.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double() / self.temperature
        V = logits.shape[-1]
        ids = torch.arange(V, device=logits.device).expand_as(logits)
        if self.top_k or self.top_p < 1:
            logits, ids = logits.topk(min(self.top_k or V, V), -1)
        if self.top_p < 1:
            probabilities = logits.softmax(-1)
            above = probabilities.cumsum(-1) - probabilities
            logits = logits.masked_fill(above >= self.top_p, -torch.inf)
        winner = (logits + noise.gumbel(request[:, None], step[:, None], ids)).argmax(-1, keepdim=True)
        return ids.gather(-1, winner)[:, 0]
