"""StreamingLLM: attention sinks and the newest tokens (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from kvlib.policies.base import Policy, Share


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keep the first n_sink and the newest tokens; keys keep their original positions.

    Follows `StartRecentKVCache` (mit-han-lab/streaming-llm, kv_cache.py), with its 4 sinks. Its positions, counted
    inside the cache, are applied with reindex=True only; ports to reasoning models keep the original ones.
    """

    n_sink: int = 4
    share: Share = "model"
    reads_heads: ClassVar[bool] = False

    def score(self, view, state):
        return view.positions.float(), state
