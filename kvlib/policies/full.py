"""Full cache: nothing is ever evicted."""

from dataclasses import dataclass
from typing import ClassVar

from kvlib.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The reference: memory grows with the output."""

    evicts: ClassVar[bool] = False
    reads_heads: ClassVar[bool] = False
