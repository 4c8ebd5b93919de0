"""TOVA: attention of the newest query, averaged over the heads of a layer (arXiv 2401.06104)."""

from dataclasses import dataclass

import torch

from kvlib.policies.base import Policy, Share
from kvlib.policies.observe import attention, observe


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Keep what the newest query attends to: one keep set per layer, by the mean over all its query heads.

    Follows `TOVACache.reduce` (schwartz-lab-NLP/TOVA, src/tova_cache.py): a round every step, nothing protected, so
    that the newest token itself may go. NVIDIA/kvpress always keeps it: n_recent=1.
    """

    share: Share = "layer"

    @property
    def n_queries(self) -> int:
        return 1

    def score(self, view, state):
        return torch.stack([attention(*layer).mean((2, 3)) for layer in observe(view, 1)]), state
