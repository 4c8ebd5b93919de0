"""One round of eviction, the same for every policy: score, share, protect, select, compact."""

import torch
from torch import Tensor

from kvlib.cache import SlotCache
from kvlib.policies.base import Policy, Share, View
from kvlib.rope import rotate


def share_scores(scores: Tensor, share: Share) -> Tensor:
    """Average scores `[L or 1, R, H or 1, N]` over what shares one keep set."""
    over = {"head": (), "layer": (2,), "head_across_layers": (0,), "model": (0, 2)}[share]
    return scores.mean(over, keepdim=True) if over else scores


def protection(positions: Tensor, n_prompt: Tensor, n_sink: int, protect_prompt: bool, n_recent: int) -> Tensor:
    """Bool, like positions `[L or 1, R, H or 1, N]` (ascending): sinks, prompt (n_prompt `[R]`), newest n_recent."""
    N = positions.shape[-1]
    recent = torch.arange(N, device=positions.device) >= N - n_recent
    first = n_prompt.clamp(min=n_sink) if protect_prompt else torch.full_like(n_prompt, n_sink)
    return (positions < first[None, :, None, None]) | recent


def select(scores: Tensor, protected: Tensor, n_keep: Tensor) -> Tensor:
    """The keep mask, bool like scores `[L or 1, R, H or 1, N]` in position order: n_keep `[R]` True per head.

    Protected slots come first, then the highest scores; the newer of two equals wins.
    """
    if scores.isnan().any():
        raise FloatingPointError("a policy scored a slot NaN; the model's keys, values or queries are not finite")
    ranked = torch.where(protected, torch.inf, scores)
    newest_first = ranked.flip(-1)
    order = newest_first.argsort(dim=-1, descending=True, stable=True)
    # Protected slots outrank a policy's own +inf.
    order = order.gather(
        -1, protected.flip(-1).gather(-1, order).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    )
    chosen = torch.arange(scores.shape[-1], device=scores.device) < n_keep.view(1, -1, 1, 1)
    return torch.zeros_like(protected).scatter(-1, order, chosen.expand_as(order)).flip(-1)


def evict(
    cache: SlotCache,
    policy: Policy,
    kv_budget: int,
    rows: Tensor,
    n_live: int,
    n_prompt: Tensor,
    n_keep: Tensor,
    request: Tensor,
    step: Tensor,
    scaling: float,
    inv_freq: Tensor,
) -> Tensor:
    """Run one round on `rows [R]`, each holding n_live slots; leaves n_keep `[R]`. Returns the mask in position order.

    n_prompt, request (noise keys) and step (tokens seen) are `[R]`; inv_freq `[D / 2]` is RoPE's.
    """
    positions = cache.positions[:, rows, :, :n_live]
    positions, slots = positions.sort(-1)
    view = View(
        kv_budget=kv_budget,
        positions=positions,
        n_prompt=n_prompt,
        n_keep=n_keep,
        scaling=scaling,
        inv_freq=inv_freq,
        request=request,
        step=step,
        _slots=slots,
        _keys=cache.keys[:, rows, :, :n_live],
        _values=cache.values[:, rows, :, :n_live],
        _ring=cache.ring[:, rows],
    )
    state = {name: tensor[:, rows, :, :n_live].gather(-1, slots) for name, tensor in cache.state.items()}
    scores, state = policy.score(view, state)
    scores = share_scores(scores, policy.share).expand_as(positions)
    protected = protection(positions, n_prompt, policy.n_sink, policy.protect_prompt, policy.recent(kv_budget))
    kept = select(scores, protected, n_keep)
    for name, tensor in cache.state.items():
        old = tensor[:, rows, :, :n_live]
        tensor[:, rows, :, :n_live] = old.scatter(-1, slots, state[name])
    if policy.reindex:
        n_newer_evicted = (~kept).flip(-1).cumsum(-1).flip(-1)
        shift = torch.zeros_like(n_newer_evicted).scatter(-1, slots, n_newer_evicted)
        cache.keys[:, rows, :, :n_live] = rotate(cache.keys[:, rows, :, :n_live], shift, inv_freq)
    cache.keep(rows, torch.zeros_like(kept).scatter(-1, slots, kept), n_keep)
    return kept
