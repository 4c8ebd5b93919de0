"""Sampling on the device from temperature, top-p and top-k, with counter-based noise."""

from dataclasses import dataclass

from torch import Tensor

from kvlib.kernels.sampler import sample


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 and top_k 0 switch the filters off."""

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0

    def __call__(self, logits: Tensor, request: Tensor, step: Tensor) -> Tensor:
        """Draw ids `[B]` from logits `[B, V]`; request and step `[B]` key the noise (kvlib.kernels.sampler.sample)."""
        return sample(logits, request, step, self.temperature, self.top_p, self.top_k)
