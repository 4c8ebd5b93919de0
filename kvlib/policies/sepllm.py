"""SepLLM: separators stand for the text before them (arXiv 2412.12094)."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvlib.policies.base import Policy, Share

SEPARATOR = "separator"


@cache
def on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as a tensor, sent once."""
    return torch.tensor(ids, device=device)


@dataclass(frozen=True, kw_only=True)
class SepLLM(Policy):
    """Keep sinks, the newest n_recent tokens, then separators, newest first, then the newest of the others.

    One keep set for the model. Sinks and neighbours as published (HKUDS/SepLLM, training-free: 4 and 256 of a cache
    of 800). The original caps separators at 64 and leaves the rest of the cache empty after a round; here they take
    what is free. reindex=True gives its positions in the cache.

    separators: token ids; None: the tokens that consist of punctuation and white space (`kvlib.fitted`).
    """

    n_sink: int = 4
    n_recent: int = 256
    share: Share = "model"
    separators: tuple[int, ...] | None = None
    state_names = (SEPARATOR,)
    needs = ("separators",)
    reads_heads = False
    shares = ("model",)

    def creation_score(self, hidden, token_ids, answering):
        # torch.isin sorts larger sets, and then waits for the device.
        is_separator = (token_ids[:, None] == on_device(self.separators, token_ids.device)).any(-1)
        return {SEPARATOR: is_separator.float()}

    def score(self, view, state):
        return state[SEPARATOR], state
