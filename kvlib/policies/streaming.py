"""StreamingLLM: attention sinks and the newest tokens (arXiv 2309.17453)."""

from dataclasses import dataclass

from kvlib.policies.window import Window


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Window):
    """Keep the first n_sink and the newest tokens; keys keep their original positions.

    Follows `StartRecentKVCache` (mit-han-lab/streaming-llm, kv_cache.py), with its 4 sinks. Its positions, counted
    inside the cache, are applied with reindex=True only; ports to reasoning models keep the original ones.
    """

    n_sink: int = 4
