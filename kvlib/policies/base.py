"""What every policy shares, and what a policy sees in a round."""

import inspect
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.kernels.noise import uniform

MASS = "mass"
"""The state that sums the attention each slot has received; the engine adds to it."""

MOST_SLOTS = 2**20
"""Where the search for a budget that will do ends."""

Share = Literal["head", "layer", "head_across_layers", "model"]
Whole = Annotated[int, "a whole number, 0 or more", lambda x: isinstance(x, Integral) and x >= 0]
Count = Annotated[int, "a whole number, 1 or more", lambda x: isinstance(x, Integral) and x >= 1]
Odd = Annotated[int, "an odd number of slots", lambda x: isinstance(x, Integral) and x >= 1 and x % 2 == 1]
Part = Annotated[float, "a share from 0 to 1", lambda x: isinstance(x, Real) and 0 <= x <= 1]
Buffer = Annotated[
    int | None, "a whole number of tokens, 0 or more", lambda x: x is None or (type(x) is int and x >= 0)
]
SomePart = Annotated[float, "a share above 0, at most 1", lambda x: isinstance(x, Real) and 0 < x <= 1]


def wide(x: Tensor) -> Tensor:
    """In float32 at least, which scores are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings that every policy has; a policy adds its hyper-parameters and `score`.

    n_sink: first tokens that are never evicted. protect_prompt: never evict the prompt. n_recent: newest tokens
    that are never evicted. buffer: tokens that fit in after a round, so that keep = kv_budget - buffer
    (0 = a round every step). share: one keep set per KV head of each layer, per layer, per KV head for all layers,
    or for the whole model; finer scores are averaged. reindex: RoPE as if the kept tokens were contiguous, the
    newest at its true position (StreamingLLM, section 3.2), instead of at their original positions.
    """

    n_sink: Whole = 0
    protect_prompt: bool = False
    n_recent: Whole = 0
    buffer: Buffer = 0
    share: Share = "head"
    reindex: bool = False

    evicts: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields that are made from the model, and filled in by `kvlib.fitted`."""
    reads_heads: ClassVar[bool] = True
    """`score` reads keys, values or queries."""
    shares: ClassVar[tuple[str, ...]] = get_args(Share)
    """What may share one keep set."""
    reads_rope: ClassVar[bool] = False
    """`score` reads inv_freq."""

    def __post_init__(self):
        # A plain type beside another default keeps the rule of the class that this one is derived from.
        rules = {
            name: hint
            for kind in reversed(type(self).__mro__)
            for name, hint in inspect.get_annotations(kind).items()
            if get_origin(hint) in (Annotated, Literal)
        }
        for name, hint in rules.items():
            value, rule = getattr(self, name), get_args(hint)
            if get_origin(hint) is Annotated:
                _, words, holds = rule
            else:
                known = self.shares if name == "share" else rule
                words, holds = f"one of {', '.join(known)}", known.__contains__
            self.require(holds(value), f"{name} is {value!r}; use {words}")

    def require(self, holds: bool, problem: str) -> None:
        """Raise ConfigError with this policy's name unless `holds`."""
        if not holds:
            raise ConfigError(f"{type(self).__name__}: {problem}")

    @property
    def n_queries(self) -> int:
        """How many of the last queries `score` reads."""
        return 0

    def limit(self, kv_budget: int, n_prompt: int, n_held: int) -> int:
        """The next round comes when more slots than this are live; n_held stayed after the last one, or the prompt."""
        return kv_budget

    def keep(self, kv_budget: int, n_prompt: int, n_seen: int) -> int:
        """Slots left after a round, if there are more; n_seen: tokens so far, the prompt included."""
        return kv_budget - self.buffer

    def recent(self, kv_budget: int) -> int:
        """Newest tokens that are never evicted."""
        return self.n_recent

    def protection(self, view: "View") -> Tensor:
        """Bool like `view.positions`: sinks, prompt and the newest tokens, which a round never evicts.

        Reads positions (ascending), n_prompt and kv_budget of the view only.
        """
        N = view.positions.shape[-1]
        first = (view.n_prompt * self.protect_prompt).clamp(min=self.n_sink)[None, :, None, None]
        newest = torch.arange(N, device=view.positions.device) >= N - self.recent(view.kv_budget)
        return (view.positions < first) | newest

    def protected(self, kv_budget: int, n_prompt: int, n_seen: int) -> list[int]:
        """Positions that `protection` spares when n_seen tokens have been seen."""
        positions = torch.arange(n_seen, device="cpu").view(1, 1, 1, -1)
        row = SimpleNamespace(kv_budget=kv_budget, positions=positions, n_prompt=torch.tensor([n_prompt], device="cpu"))
        return self.protection(row).flatten().nonzero()[:, 0].tolist()

    def check(self, kv_budget: int, n_prompt: int, problem: str) -> None:
        """Raise ConfigError, with the least budget that will do, unless n_prompt tokens can be decoded under this one.

        n_prompt 0: not known yet, and so not counted.
        """
        trouble = self.trouble(kv_budget, n_prompt)
        if trouble is None:
            return
        larger = range(kv_budget + 1, MOST_SLOTS)
        first = bisect_left(larger, True, key=lambda works: self.trouble(works, n_prompt) is None)
        if first == len(larger):
            step = "no kv_budget will do: lower n_recent, buffer or the share that is kept"
        else:
            before = "" if n_prompt else ", before a prompt is counted"
            step = f"use {larger[first]} or more{before}, or protect less"
        raise ConfigError(
            f"kv_budget {kv_budget} of {type(self).__name__} is too small for {problem} ({n_prompt}-token prompt, "
            f"protect_prompt={self.protect_prompt}, n_sink={self.n_sink}, n_recent={self.recent(kv_budget)}, "
            f"buffer={self.buffer}): {trouble}; {step}"
        )

    def trouble(self, kv_budget: int, n_prompt: int) -> str | None:
        """What keeps n_prompt tokens from being decoded under this budget, in a clause; None if nothing does."""
        if n_prompt > kv_budget:
            return "the prompt does not fit"
        keep = self.keep(kv_budget, n_prompt, kv_budget + 1)
        if not 1 <= keep <= kv_budget:
            return f"{keep} slots stay after a round"
        if self.n_queries > keep:
            return f"{self.n_queries} queries observe, and {keep} slots stay after a round"
        protected = len(self.protected(kv_budget, n_prompt, kv_budget + 1))
        return f"{keep} slots stay after a round, and {protected} are protected" if protected > keep else None

    def creation_score(self, hidden: Tensor, token_ids: Tensor, answering: Tensor) -> dict[str, Tensor]:
        """State of B new tokens, by name: float32 `[B]`, or `[L, B, H]` where it differs by layer and head.

        hidden `[B, d]` (final norm applied), token_ids `[B]`, answering `[B]` bool (from `</think>` on).
        """
        return {}

    def score(self, view: "View", state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Importance of the live slots, higher = keep, broadcastable to `[L, R, H, N]`; and the new state.

        Pure: state tensors are `[L or 1, R, H or 1, N]` in position order, like everything in view.
        """
        raise NotImplementedError(f"policy {type(self).__name__} has no score(view, state)")


@dataclass(frozen=True)
class Round:
    """What a round knows of its rows `[R]`: n_live slots are held by each, n_keep `[R]` stay.

    n_prompt `[R]`: prompt tokens; noise_key `[R]`: of what each row decodes; n_seen `[R]`: tokens seen so far, so that
    the newest has position n_seen - 1; scaling: of q.k; inv_freq `[D / 2]`: radians per position of RoPE.
    """

    kv_budget: int
    rows: Tensor
    n_live: int
    n_prompt: Tensor
    n_keep: Tensor
    noise_key: Tensor
    n_seen: Tensor
    scaling: float
    inv_freq: Tensor

    by_row: ClassVar = ("rows", "n_prompt", "n_keep", "noise_key", "n_seen")


@dataclass(frozen=True)
class View(Round):
    """A round's N live slots in position order, newest last. `L or 1`, `H or 1`: 1 where the keep set is shared.

    positions int32 `[L or 1, R, H or 1, N]`; keys, values `[L, R, H, N, D]` (after RoPE); queries `[L, R, HQ, W, D]`:
    the last W, oldest first.
    """

    positions: Tensor
    _slots: Tensor = field(repr=False)
    _keys: Tensor = field(repr=False)
    _values: Tensor = field(repr=False)
    _ring: Tensor = field(repr=False)
    """The whole cache's, and the slots `[L or 1, R, H or 1, N]` of the rows; only what a policy reads is copied."""

    def _take(self, tensor: Tensor, slots: Tensor) -> Tensor:
        """`[L, B, H, S, D]` -> `[L, R, H, N, D]`, the slots `[L or 1, R, H or 1, N]` of the rows."""
        L, B, H, S, D = tensor.shape
        layer = torch.arange(L, device=tensor.device)[:, None, None, None]
        head = torch.arange(H, device=tensor.device)[:, None]
        index = ((layer * B + self.rows[:, None, None]) * H + head) * S + slots
        return tensor.reshape(-1, D).index_select(0, index.flatten()).view(*index.shape, D)

    @cached_property
    def keys(self) -> Tensor:
        return self._take(self._keys, self._slots)

    @cached_property
    def values(self) -> Tensor:
        return self._take(self._values, self._slots)

    @cached_property
    def queries(self) -> Tensor:
        W = self._ring.shape[3]
        seen = (self.n_seen[:, None] + torch.arange(-W, 0, device=self.n_seen.device)) % W
        return self._take(self._ring, seen[None, :, None])

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self._ring.shape[2] // self._keys.shape[2]

    @property
    def is_prompt(self) -> Tensor:
        """Bool `[L or 1, R, H or 1, N]`."""
        return self.positions < self.n_prompt[None, :, None, None]

    def heads(self, n: int) -> Tensor:
        """The number of each KV head, `[n]`: what tells the noise of heads apart."""
        return torch.arange(n, device=self.positions.device)

    def uniform(self) -> Tensor:
        """Noise in (0, 1) `[L or 1, R, H or 1, N]`, keyed by request, round, layer, head and position."""
        layers, _, heads, _ = self.positions.shape
        return uniform(
            self.noise_key[None, :, None, None],
            self.n_seen[None, :, None, None],
            torch.arange(layers, device=self.positions.device)[:, None, None, None],
            self.heads(heads)[None, None, :, None],
            self.positions,
        )
