"""Random eviction: the null every scorer must beat (arXiv 2609.03430)."""

from dataclasses import dataclass

from kvlib.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep uniformly random tokens, drawn afresh in each round and independently per layer and KV head.

    With protect_prompt and n_recent=64, buffer=64 it is Random Attention as published.
    """

    reads_heads = False

    def score(self, view, state):
        return view.uniform(), state
