"""KeyDiff: keep the keys that differ most from the average direction (arXiv 2504.15364)."""

from dataclasses import dataclass

from torch.nn import functional as F

from kvlib.policies.base import Policy, wide


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keep the slots whose keys are least similar to the mean of the unit keys, per KV head.

    `KeyDiffPress.score` (NVIDIA/kvpress). The paper works block by block, 128 tokens at a time, as rounds do here.
    """

    buffer: int | None = 128

    def score(self, view, state):
        keys = F.normalize(wide(view.keys), dim=-1)
        return -F.cosine_similarity(keys, keys.mean(-2, keepdim=True), dim=-1), state
