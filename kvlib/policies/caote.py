"""CAOTE: attention-like scores made into the output error of an eviction (arXiv 2504.14051)."""

import dataclasses
from dataclasses import dataclass

import torch

from kvlib.policies.base import Policy, Share, wide
from kvlib.policies.h2o import H2O
from kvlib.policies.rpc import RPC
from kvlib.policies.snapkv import SnapKV
from kvlib.policies.tova import TOVA

SHARED = tuple(field.name for field in dataclasses.fields(Policy))


@dataclass(frozen=True, kw_only=True)
class CAOTE(Policy):
    """A base policy whose score a_i becomes `a_i / (1 - a_i) * |v_i - o|`, o = sum of a_j v_j, a of sum 1 per KV head.

    That is how far the head's output moves when slot i goes and the rest is renormalised, exact if a is the attention.
    Slots that the base never ranks (+inf: an observing window) stay so and take no part in o.

    base: name of a preset that scores by attention (H2O, RPC, SnapKV, TOVA) or, in Python, such a policy. Settings
    that every policy has are the base's unless given here. Of the paper's formula: no official code was run. With
    share="layer", the heads' errors are averaged.
    """

    base: str | Policy = "tova"
    n_sink: int | None = None
    protect_prompt: bool | None = None
    n_recent: int | None = None
    buffer: int | None = None
    share: Share | None = None
    reindex: bool | None = None

    def __post_init__(self):
        from kvlib.policies import make_policy  # presets are made of this class

        base = make_policy(self.base) if isinstance(self.base, str) else self.base
        self.require(
            type(base) in (H2O, RPC, SnapKV, TOVA),
            f"base is {self.base!r}; use a policy that scores by attention: H2O, RPC, SnapKV, TOVA",
        )
        for name in SHARED:
            ours, its = getattr(self, name), getattr(base, name)
            self.require(ours is None or type(ours) is type(its), f"{name} is {ours!r}; the base has {its!r}")
            object.__setattr__(self, name, its if ours is None else ours)
        super().__post_init__()
        own = {name: getattr(self, name) for name in SHARED}
        object.__setattr__(self, "_base", dataclasses.replace(base, **own))

    @property
    def state_names(self) -> tuple[str, ...]:
        return self._base.state_names

    @property
    def n_queries(self) -> int:
        return self._base.n_queries

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        return self._base.limit(kv_budget, n_prompt, n_held)

    def keep(self, kv_budget: int, n_prompt: int, n_seen: int) -> int:
        return self._base.keep(kv_budget, n_prompt, n_seen)

    def recent(self, kv_budget: int) -> int:
        return self._base.recent(kv_budget)

    def score(self, view, state):
        scores, state = self._base.score(view, state)
        values = wide(view.values)
        scores = scores.to(values.dtype).expand(values.shape[:-1])
        ranked = scores.isfinite()
        paid = scores.masked_fill(~ranked, 0.0)
        a = paid / paid.sum(-1, keepdim=True).clamp(min=torch.finfo(paid.dtype).tiny)
        output = a[..., None, :] @ values
        error = a / (1 - a).clamp(min=torch.finfo(a.dtype).eps) * (values - output).norm(dim=-1)
        return torch.where(ranked, error, scores), state
