"""Hits: decoded queries that pay a slot alpha or more, and the rounds of a policy that remembers all of them."""

from dataclasses import dataclass

from torch import Tensor

from kvlib.policies.base import Policy, SomePart, View
from kvlib.policies.observe import query_positions


def decoded(view: View, n_queries: int) -> Tensor:
    """Bool `[R, W]`: which of the last W queries are of decoded tokens, not of the prompt."""
    return query_positions(view, n_queries) >= view.n_prompt[:, None]


@dataclass(frozen=True, kw_only=True)
class Hits(Policy):
    """Settings and rhythm of a policy that remembers hits per KV head.

    A round comes every buffer + 1 tokens from the first decoded one on, and keeps all while they fit, so that the ring
    of buffer + 1 queries misses none.
    """

    alpha: SomePart = 1e-4
    shares = ("head",)

    @property
    def n_queries(self) -> int:
        return self.buffer + 1

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        return min(kv_budget, n_held + self.buffer)
