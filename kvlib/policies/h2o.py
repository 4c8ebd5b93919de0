"""H2O: heavy hitters by accumulated attention (arXiv 2306.14048)."""

from dataclasses import dataclass

from kvlib.policies.base import MASS, Part, Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keep the slots that received most attention since they were made, and the newest `recent_ratio` of the budget.

    Per KV head, attention summed over the group, the prompt's queries included. Follows
    `H2OKVCache_LayerWise` (FMInference/H2O, utils_real_drop/modify_llama.py), half heavy and half recent.

    per_query: rank by the mean over the queries that saw the slot instead, which does not favour old slots
    (`ObservedAttentionPress`, NVIDIA/kvpress; there of the prompt's queries only, here carried on while decoding).
    """

    recent_ratio: Part = 0.5
    per_query: bool = False
    state_names = (MASS,)
    reads_heads = False
    shares = ("head",)

    def recent(self, kv_budget: int) -> int:
        return max(self.n_recent, int(self.recent_ratio * self.keep(kv_budget, 0, 0)))

    def score(self, view, state):
        mass = state[MASS]
        if self.per_query:
            mass = mass / (view.n_seen[None, :, None, None] - view.positions) / view.group
        return mass, state
