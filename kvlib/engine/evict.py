"""One round of eviction, the same for every policy: score, share, protect, select, compact."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvlib.engine.cache import SlotCache
from kvlib.errors import ConfigError
from kvlib.kernels.rope import rotate
from kvlib.policies.base import Policy, Round, Share, View


def share_scores(scores: Tensor, share: Share) -> Tensor:
    """Average scores `[L or 1, R, H or 1, N]` over what shares one keep set."""
    over = {"head": (), "layer": (2,), "head_across_layers": (0,), "model": (0, 2)}[share]
    return scores.mean(over, keepdim=True) if over else scores


def select(scores: Tensor, protected: Tensor, n_keep: Tensor) -> Tensor:
    """The keep mask, bool like scores `[L or 1, R, H or 1, N]` in position order: n_keep `[R]` True per head.

    Protected slots come first, then the highest scores; the newer of two equals wins.
    """
    # Protected slots outrank a policy's own +inf.
    ranked = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(protected, torch.inf)
    order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < n_keep.view(1, -1, 1, 1)
    return torch.zeros_like(protected).scatter(-1, order, chosen.expand_as(order)).flip(-1)


def split(due: Round, n: int) -> Iterator[Round]:
    """The same in slices of n rows."""
    if n >= len(due.rows):
        yield due
        return
    for start in range(0, len(due.rows), n):
        yield replace(due, **{name: getattr(due, name)[start : start + n] for name in due.by_row})


def look(cache: SlotCache, due: Round) -> tuple[View, dict[str, Tensor], Tensor]:
    """The rows' live slots in position order, their policy state, and the slot of each: `[L or 1, R, H or 1, N]`."""
    rows, n = due.rows, due.n_live
    positions, slots = cache.positions[:, rows, :, :n].sort(-1)
    view = View(
        **vars(due), positions=positions, _slots=slots, _keys=cache.keys, _values=cache.values, _ring=cache.ring
    )
    state = {name: tensor[:, rows, :, :n].gather(-1, slots) for name, tensor in cache.state.items()}
    return view, state, slots


def evict(cache: SlotCache, policy: Policy, due: Round) -> tuple[Tensor, Tensor]:
    """Run one round, without waiting for the device.

    Returns the keep mask in position order, `[L or 1, R, H or 1, N]`, and whether all scores were numbers, a bool on
    the device: False means that the model's keys, values or queries are not finite, and the caller must raise.
    """
    rows, n = due.rows, due.n_live
    view, state, slots = look(cache, due)
    scores, state = policy.score(view, state)
    if lost := cache.state.keys() - state.keys():
        name = sorted(lost)[0]
        raise ConfigError(f"{type(policy).__name__}.score returned no state {name!r}; return all that it was given")
    scores = share_scores(scores, policy.share).expand_as(view.positions)
    kept = select(scores, policy.protection(view), due.n_keep)
    for name, tensor in cache.state.items():
        tensor[:, rows, :, :n] = tensor[:, rows, :, :n].scatter(-1, slots, state[name])
    if policy.reindex:
        n_newer_evicted = (~kept).flip(-1).cumsum(-1).flip(-1)
        shift = torch.zeros_like(n_newer_evicted).scatter(-1, slots, n_newer_evicted)
        cache.keys[:, rows, :, :n] = rotate(cache.keys[:, rows, :, :n], shift, due.inv_freq)
    cache.keep(rows, torch.zeros_like(kept).scatter(-1, slots, kept), due.n_keep)
    return kept, ~scores.isnan().any()
