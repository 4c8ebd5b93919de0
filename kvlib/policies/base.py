"""What every policy shares, and what a policy sees in a round."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvlib import noise
from kvlib.errors import ConfigError

Share = Literal["head", "layer", "model"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings that every policy has; a policy adds its hyper-parameters and `score`.

    n_sink: first tokens that are never evicted. protect_prompt: never evict the prompt. n_recent: newest tokens
    that are never evicted. buffer: tokens appended between rounds, so that keep = kv_budget - buffer
    (1 = a round every step). share: one keep set per KV head of each layer, per layer, or for the whole model;
    finer scores are averaged.
    """

    n_sink: int = 0
    protect_prompt: bool = False
    n_recent: int = 0
    buffer: int | None = 1
    share: Share = "head"

    evicts: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        self.require(self.n_sink >= 0, f"n_sink is {self.n_sink}; use 0 or more")
        self.require(self.n_recent >= 0, f"n_recent is {self.n_recent}; use 0 or more")
        self.require(
            self.buffer is None or (type(self.buffer) is int and self.buffer >= 1),
            f"buffer is {self.buffer!r}; use a whole number of tokens, 1 or more",
        )
        self.require(
            self.share in ("head", "layer", "model"), f"share is {self.share!r}; use 'head', 'layer' or 'model'"
        )

    def require(self, holds: bool, problem: str) -> None:
        """Raise ConfigError with this policy's name unless `holds`."""
        if not holds:
            raise ConfigError(f"{type(self).__name__}: {problem}")

    @property
    def n_queries(self) -> int:
        """How many of the last queries `score` reads."""
        return 0

    def keep(self, kv_budget: int, n_prompt: int) -> int:
        """Slots left after a round."""
        return kv_budget - self.buffer

    def recent(self, kv_budget: int) -> int:
        """Newest tokens that are never evicted."""
        return self.n_recent

    def protected(self, kv_budget: int, n_prompt: int) -> int:
        """Slots that are never evicted, overlaps counted once."""
        head = max(self.n_sink, n_prompt if self.protect_prompt else 0)
        return head + self.recent(kv_budget)

    def check(self, kv_budget: int, n_prompt: int, problem: str) -> None:
        """Raise ConfigError unless a prompt of n_prompt tokens can be decoded under this budget."""
        if n_prompt > kv_budget:
            raise ConfigError(
                f"the {n_prompt}-token prompt of {problem} does not fit into kv_budget {kv_budget}; "
                f"use {n_prompt + (self.buffer or 1)} or more"
            )
        keep, protected = self.keep(kv_budget, n_prompt), self.protected(kv_budget, n_prompt)
        self.require(
            1 <= keep <= kv_budget,
            f"kv_budget {kv_budget} leaves {keep} slots after a round; it must be 1 to {kv_budget}, change kv_budget, "
            f"buffer={self.buffer} or the share that is kept",
        )
        self.require(
            self.n_queries <= keep,
            f"{self.n_queries} queries observe, and only {keep} slots stay; raise kv_budget {kv_budget}",
        )
        if protected > keep:
            least = next(
                (b for b in range(kv_budget, 64 * kv_budget) if self.protected(b, n_prompt) <= self.keep(b, n_prompt)),
                None,
            )
            raise ConfigError(
                f"kv_budget {kv_budget} keeps {keep} slots after a round and cannot hold the {protected} protected "
                f"({n_prompt}-token prompt of {problem}: protect_prompt={self.protect_prompt}, n_sink={self.n_sink}, "
                f"n_recent={self.recent(kv_budget)}); "
                + (f"use {least} or more, or protect less" if least else "protect less")
            )

    def creation_score(self, hidden: Tensor, answering: Tensor) -> dict[str, Tensor]:
        """State of new tokens, by name: hidden `[B, d]` (final norm applied), answering `[B]` bool -> float32 `[B]`."""
        return {}

    def score(self, view: "View", state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Importance of the live slots, higher = keep, broadcastable to `[L, R, H, N]`; and the new state.

        Pure: state tensors are `[L or 1, R, H or 1, N]` in position order, like everything in view.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class View:
    """The N live slots of R rows in position order, newest last. `L or 1`, `H or 1`: 1 where the keep set is shared.

    positions int32 `[L or 1, R, H or 1, N]`; n_prompt `[R]`: prompt tokens; kv_budget; keys, values
    `[L, R, H, N, D]` (after RoPE); queries `[L, R, HQ, W, D]`: the last W, oldest first; scaling: of q.k;
    request `[R]`: noise key of what each row decodes; step `[R]`: tokens seen so far.
    """

    kv_budget: int
    positions: Tensor
    n_prompt: Tensor
    scaling: float
    request: Tensor
    step: Tensor
    _slots: Tensor = field(repr=False)
    _keys: Tensor = field(repr=False)
    _values: Tensor = field(repr=False)
    _ring: Tensor = field(repr=False)

    def _in_order(self, tensor: Tensor) -> Tensor:
        L, R, H, _, D = tensor.shape
        slots = self._slots.expand(L, R, H, -1)[..., None].expand(-1, -1, -1, -1, D)
        return tensor.gather(3, slots)

    @cached_property
    def keys(self) -> Tensor:
        return self._in_order(self._keys)

    @cached_property
    def values(self) -> Tensor:
        return self._in_order(self._values)

    @cached_property
    def queries(self) -> Tensor:
        W = self._ring.shape[3]
        seen = (self.step[:, None] + torch.arange(-W, 0, device=self.step.device)) % W
        index = seen[None, :, None, :, None].expand(*self._ring.shape[:3], W, self._ring.shape[4])
        return self._ring.gather(3, index)

    @property
    def is_prompt(self) -> Tensor:
        """Bool `[L or 1, R, H or 1, N]`."""
        return self.positions < self.n_prompt[None, :, None, None]

    def uniform(self) -> Tensor:
        """Noise in (0, 1) `[L or 1, R, H or 1, N]`, keyed by request, round, layer, head and position."""
        layers, _, heads, _ = self.positions.shape
        device = self.positions.device
        return noise.uniform(
            self.request[None, :, None, None],
            self.step[None, :, None, None],
            torch.arange(layers, device=device)[:, None, None, None],
            torch.arange(heads, device=device)[None, None, :, None],
            self.positions,
        )
