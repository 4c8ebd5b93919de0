"""Sliding window: the newest tokens only."""

from dataclasses import dataclass

from kvlib.policies.base import Policy, Share


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """Keep the newest tokens. With protect_prompt it is the recency + prompt null of arXiv 2609.03430."""

    share: Share = "model"
    reads_heads = False

    def score(self, view, state):
        return view.positions.float(), state
