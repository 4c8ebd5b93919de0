"""Key norm: keep the keys of small norm (arXiv 2406.11430)."""

from dataclasses import dataclass

from kvlib.policies.base import Policy, wide


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keep the slots whose keys have the smallest norm, per KV head (`KnormPress.score`, NVIDIA/kvpress).

    Written for prefill, where nothing is protected. Here a round comes every 128 tokens, as for most policies;
    kvpress' DecodingPress waits for 512.
    """

    buffer: int | None = 128

    def score(self, view, state):
        return -wide(view.keys).norm(dim=-1), state
