"""Drivers for the oracle vectors of policies that score by attention."""

import numpy as np
import torch
from oracle_cases import (
    Case,
    append,
    assert_scores,
    kept_by,
    kept_positions,
    run_round,
    valid,
    view_of,
)

from kvlib.engine.cache import CacheShape, SlotCache
from kvlib.policies import H2O, Policy, SnapKV
from kvlib.policies.gkv import GKV, SCORE, SCORED
from kvlib.policies.lazy import LAST_HIT, LONGEST_GAP, LazyEviction
from kvlib.policies.rpc import RPC
from kvlib.policies.tova import TOVA


def chosen(policy: Policy, view) -> tuple[torch.Tensor, list[list[int]]]:
    """Scores `[H, N]` and the kept slots of a view of one row and layer."""
    scores, _ = policy.score(view, {})
    kept = kept_by(policy, view, scores)[0, 0]
    return scores[0, 0], [row.nonzero()[:, 0].tolist() for row in kept]


class Tap:
    """The policy, recording what its last `score` gave in position order."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def score(self, view, state):
        self.scores, self.state = self.policy.score(view, state)
        return self.scores, self.state


def one_sequence(policy: Policy, keys: torch.Tensor, n_query_heads: int, n_slots: int) -> SlotCache:
    """An empty cache for keys `[H, T, D]`."""
    H, D = keys.shape[0], keys.shape[2]
    shape = CacheShape(
        n_layers=1, n_rows=1, n_kv_heads=H, n_query_heads=n_query_heads, n_slots=n_slots, head_dim=D,
        shared_heads=policy.share == "layer", n_queries=policy.n_queries, state_names=policy.state_names,
    )  # fmt: skip
    return SlotCache(shape, torch.float64, "cpu")


def feed(cache: SlotCache, keys: torch.Tensor, position: int, query: torch.Tensor | None = None) -> None:
    """Append the token of this position; query `[HQ, D]` enters the ring."""
    slot = int(cache.lengths[0])
    cache.keys[0, 0, :, slot] = keys[:, position]
    if query is not None:
        cache.ring[0, 0, :, position % cache.shape.n_queries] = query
    append(cache, position)


def in_order(cache: SlotCache, name: str) -> torch.Tensor:
    """State `[H, n]` of the live slots by position."""
    n = int(cache.lengths[0])
    order = cache.positions[0, 0, :, :n].argsort(-1)
    return cache.state[name][0, 0, :, :n].gather(-1, order)


def check_snapkv_like(case: Case, keys: torch.Tensor, capacity: int, group: str) -> None:
    p = case.params
    W = p["window"]
    pooling = {"avgpool": "avg", "maxpool": "max"}[p["pooling"]]
    policy = SnapKV(
        n_obs=W,
        n_recent=W,
        kernel=p["kernel"],
        pooling=pooling,
        group="mean" if group == "sum" else group,
        domain="all",
    )
    queries = case.double("q_last")[None, None]
    scores, kept = chosen(policy, view_of(keys[None, None], queries, n_keep=min(capacity, keys.shape[1])))
    # The originals sum over queries, and one of the group's reductions is a sum.
    factor = W * (queries.shape[2] // keys.shape[0] if group == "sum" else 1)
    if not p["noop"]:
        assert_scores(scores[:, : keys.shape[1] - W] * factor, case["scores"])
    assert kept == case["kept"].tolist()


def check_snapkv_original(case: Case) -> None:
    keys = case.double("k")
    per_query_head = keys.repeat_interleave(case.params["HQ"] // keys.shape[0], 0)
    check_snapkv_like(case, per_query_head, case.params["capacity"], "mean")


def check_kvfactory_snapkv(case: Case) -> None:
    check_snapkv_like(case, case.double("k"), case.params["capacity"], case.params["group_reduce"])


def check_kvfactory_pyramidkv(case: Case) -> None:
    """SnapKV with another number of slots per layer, recorded as n_kept; kvlib gives all layers the same."""
    p = case.params
    assert p["capacity"] and p["num_layers"] > p["layer"] and p["beta"], "they decide n_kept"
    check_snapkv_like(case, case.double("k"), p["n_kept"], p["group_reduce"])


def check_kvpress_snapkv(case: Case) -> None:
    p = case.params
    W = p["window_size"]
    policy = SnapKV(n_obs=W, n_recent=W, kernel=p["kernel_size"], pooling="avg", group="mean", domain="all")
    view = view_of(case.double("k")[None, None], case.double("q")[None, None], n_keep=p["keep"])
    scores, kept = chosen(policy, view)
    assert_scores(scores[:, :-W], case["scores"][:, :-W])
    assert kept == case["kept"].tolist()


def check_kvpress_tova(case: Case) -> None:
    policy = TOVA(n_recent=1)
    view = view_of(case.double("k")[None, None], case.double("q")[None, None], n_keep=case.params["keep"])
    scores, kept = chosen(policy, view)
    shared = scores.mean(0, keepdim=True).expand(case["scores"].shape)
    assert_scores(shared[:, :-1], case["scores"][:, :-1])
    assert kept * len(case["kept"]) == case["kept"].tolist()


def check_kvpress_observedattention(case: Case) -> None:
    """H2O's mass, given here; that the engine collects it is checked by the vectors of H2O."""
    p = case.params
    policy = H2O(per_query=True, recent_ratio=0.0)
    keys = case.double("k")[None, None]
    mass = case.double("attention").unflatten(0, (p["H"], -1)).sum((1, 2))
    view = view_of(keys, case.double("q")[None, None], n_keep=p["keep"])
    scores, _ = policy.score(view, {"mass": mass[None, None]})
    assert_scores(scores[0, 0], case["scores"])
    kept = kept_by(policy, view, scores)[0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in kept] == case["kept"].tolist()


def check_tova(case: Case) -> None:
    p = case.params
    L, T, size = p["prefill"], p["steps"], p["cache_size"]
    for row in range(p["batch"]):
        queries, keys = case.double("q")[row], case.double("k")[row]
        policy = Tap(TOVA())
        cache = one_sequence(policy, keys, p["HQ"], max(L, size) + 1)
        for position in range(L + T):
            t = position - L + 1
            feed(cache, keys, position, queries[:, t] if t >= 0 else None)
            if t < 0:
                continue
            n = int(cache.lengths[0])
            run_round(cache, policy, min(n, size), L, position + 1)
            assert_scores(policy.scores[0, 0].mean(0), case["scores"][t, row, :n])
            assert kept_positions(cache) == [valid(case["kept"][t, row])]


def check_rpc(case: Case) -> None:
    """Rounds come at, and leave, what the policy's own limit and keep say."""
    p = case.params
    keys, budget = case.double("k"), 1000
    policy = Tap(
        RPC(
            n_obs=p["R"], n_recent=p["R"], interval=p["P"], compression=p["c"], kernel=p["kernel"], buffer=0,
            pooling={"avgpool": "avg", "maxpool": "max"}[p["pooling"]],
            share={"all": "layer", "group": "head"}[p["aggregation"]], last_query_twice=p["last_query_twice"],
        )
    )  # fmt: skip
    cache = one_sequence(policy, keys, p["HQ"], keys.shape[1] + 1)
    limit, done = policy.limit(budget, p["prompt"], p["prompt"]), 0
    for position in range(keys.shape[1]):
        feed(cache, keys, position)
        n, seen = int(cache.lengths[0]), position + 1
        if n <= limit:
            continue
        assert kept_positions(cache) == [valid(row) for row in case["slots_before"][done]]
        asked = case["selector_pos"][done]
        assert len(set(asked.tolist())) == p["R"] - p["last_query_twice"]
        for selector, at in zip(case.double("selectors")[done].unbind(1), asked, strict=True):
            cache.ring[0, 0, :, int(at) % p["R"]] = selector
        n_keep = policy.keep(budget, p["prompt"], seen)
        assert n_keep == p["prompt"] + (done + 1) * p["T"] + p["R"]
        run_round(cache, policy, n_keep, p["prompt"], seen)
        assert_scores(
            policy.scores[0, 0][:, p["prompt"] : n - p["R"]], case["scores"][done][:, : n - p["R"] - p["prompt"]]
        )
        assert kept_positions(cache) == [valid(row) for row in case["kept"][done]]
        limit, done = policy.limit(budget, p["prompt"], n_keep), done + 1
    assert done == p["rounds"]


def check_gkv(case: Case) -> None:
    p = case.params
    keys, W = case.double("k"), p["window"]
    assert p["smooth"] in ("max", "mean", "sum") and p["lam"] and p["kernel"], "read below where they count"
    policy = Tap(
        GKV(
            n_obs=W, n_recent=W, mix_lambda=p["lam"] if p["redundancy"] else 1.0, decay=p["alpha"],
            smooth=p["smooth"] if p["score_cache"] else "none", normalise=p["normalise"],
            kernel=p["kernel"] if p["pooling"] else 1, threshold=p["threshold"],
        )
    )  # fmt: skip
    cache = one_sequence(policy, keys, p["HQ"], p["first"] + p["new_per_round"])
    seen = 0
    for done in range(p["rounds"]):
        for _ in range(p["new_per_round"] if done else p["first"]):
            feed(cache, keys, seen)
            seen += 1
        n = int(cache.lengths[0])
        assert kept_positions(cache) == [valid(row) for row in case["slots_before"][done]]
        for w in range(W):
            cache.ring[0, 0, :, (seen - W + w) % W] = case.double("q_window")[done][:, w]
        run_round(cache, policy, p["budget"], 0, seen)
        assert_scores(policy.scores[0, 0, :, : n - W], case["scores"][done][:, : n - W])
        assert kept_positions(cache) == [valid(row) for row in case["kept"][done]]
        if p["score_cache"]:
            assert_scores(in_order(cache, SCORE)[:, :-W].double(), case["score_cache_after"][done])
            assert (in_order(cache, SCORED) == (torch.arange(p["budget"]) < p["budget"] - W)).all()


def check_lazy(case: Case) -> None:
    """Every query head ranks for itself: one KV head each. Rounds come when the policy's own limit says."""
    p = case.params
    W, L, capacity = p["window"], p["prefill"], p["capacity"]
    queries = case.double("q")
    keys = case.double("k").repeat_interleave(p["HQ"] // p["H"], 0)
    policy = Tap(LazyEviction(alpha=p["alpha"], n_recent=W, buffer=W - 1))
    budget = max(L, capacity) + policy.buffer
    cache = one_sequence(policy, keys, p["HQ"], budget + 1)
    for position in range(L):
        feed(cache, keys, position, queries[:, position])
    limit, evicted = policy.limit(budget, L, L), 0
    for t in range(1, p["steps"] + 1):
        position = L + t - 1
        feed(cache, keys, position, queries[:, position])
        n = int(cache.lengths[0])
        assert (n > limit) == (t % W == 0)
        if n > limit:
            run_round(cache, policy, min(n, capacity), L, position + 1)
            for name, published in ((LAST_HIT, "ts"), (LONGEST_GAP, "mri")):
                rows = case[published][t - 1]
                assert in_order(cache, name).tolist() == [valid(row) for row in rows]
            if n > capacity:
                assert case["evict_steps"][evicted] == t
                published = case["scores"][evicted]
                ranked = ~np.isnan(published)
                assert (ranked.sum(-1) == n - W).all()
                assert_scores(policy.scores[0, 0, :, : n - W], published[:, : n - W])
                evicted += 1
            limit = policy.limit(budget, L, int(cache.lengths[0]))
        assert kept_positions(cache) == [valid(row) for row in case["kept"][t - 1]]
    assert evicted == len(case["evict_steps"])


CHECKS = {
    "gkv": check_gkv,
    "kvfactory_pyramidkv": check_kvfactory_pyramidkv,
    "kvfactory_snapkv": check_kvfactory_snapkv,
    "kvpress_observedattention": check_kvpress_observedattention,
    "kvpress_snapkv": check_kvpress_snapkv,
    "kvpress_tova": check_kvpress_tova,
    "lazy": check_lazy,
    "rpc": check_rpc,
    "snapkv_original": check_snapkv_original,
    "tova": check_tova,
}
