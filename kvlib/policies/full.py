"""Full cache: nothing is ever evicted."""

from dataclasses import dataclass

from kvlib.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The reference: memory grows with the output."""

    evicts = False
    reads_heads = False
