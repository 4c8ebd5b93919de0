"""kvlib's policies keep what the official codes kept. `KVLIB_ORACLES` names another folder of vectors to check."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_attention import CHECKS as ATTENTION
from oracle_cases import (
    ABOUT,
    Case,
    Params,
    append,
    assert_scores,
    inv_freq,
    kept_by,
    kept_positions,
    load_cases,
    one_row_cache,
    run_round,
    valid,
    view_of,
)
from oracle_keys import CHECKS as KEYS

import kvlib.policies
from kvlib.errors import ConfigError
from kvlib.kernels.append import append as append_token
from kvlib.kernels.attention import decode_attention
from kvlib.policies import H2O, PRESETS, RKV, Policy, SnapKV, StreamingLLM, View, make_policy
from kvlib.policies.base import MASS
from kvlib.policies.dynts import IMPORTANCE, DynTS


def check_observing(case: Case, policy: Policy) -> None:
    """SnapKV and R-KV: one round on given keys and queries, the slots scrambled."""
    p, budget = case.params, case.params["budget"]
    queries, keys = case.double("q"), case.double("k")
    H, N, D = keys.shape
    scramble = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    W, t = policy.n_obs, min(policy.n_obs, queries.shape[1])
    cache = one_row_cache(policy, N, H, queries.shape[0], D, n_queries=t)
    cache.keys[0, 0] = keys[:, scramble]
    cache.positions[0, 0] = scramble.int()
    cache.lengths[:] = N
    cache.ring[0, 0][:, torch.arange(N - t, N) % t] = queries[:, -t:]
    if p["noop"]:
        run_round(cache, policy, N, seen=N)
        assert kept_positions(cache) == case["kept"].tolist()
        return
    one, positions = torch.tensor([1]), [torch.arange(N).expand(1, 1, H, N)] * 2
    view = View(
        budget, one * 0, N, one * 0, one * budget, one, one * N, D**-0.5, inv_freq(D), *positions, keys[None, None],
        keys[None, None], cache.ring,
    )  # fmt: skip
    scores, _ = policy.score(view, {})
    assert_scores(scores[0, 0, :, : N - W], case["scores"])
    run_round(cache, policy, budget, seen=N)
    assert kept_positions(cache) == case["kept"].tolist()


def check_rkv(case: Case) -> None:
    p = case.params
    policy = RKV(
        mix_lambda=p["lam"], threshold=p["threshold"], n_obs=p["window"], n_recent=p["window"], kernel=p["kernel"]
    )
    if case["k"].ndim == 3:
        check_observing(case, policy)
        return
    # Several rows at once, as of its commit 31cf555, which compares each with itself.
    assert not p["noop"]
    view = view_of(case.double("k")[None], case.double("q")[None, :, :, -policy.n_obs :], n_keep=p["budget"])
    scores, _ = policy.score(view, {})
    assert_scores(scores[0, ..., : -policy.n_obs], case["scores"])
    kept = kept_by(policy, view, scores)[0]
    assert [[head.nonzero()[:, 0].tolist() for head in row] for row in kept] == case["kept"].tolist()


def check_snapkv_decode(case: Case) -> None:
    p = case.params
    check_observing(case, SnapKV(n_obs=p["window"], n_recent=p["window"], kernel=p["kernel"]))


def check_h2o(case: Case) -> None:
    p = case.params
    assert p["group_reduce"] in ("none", "sum")
    queries, keys = case.double("q"), case.double("k")
    L, T, H, HQ, D = p["prefill"], p["steps"], p["H"], p["HQ"], p["D"]
    size = p["heavy"] + p["recent"]
    policy = H2O(n_recent=p["recent"], recent_ratio=0.0)
    cache = one_row_cache(policy, max(L, size) + 1, H, HQ, D)

    def prefill() -> None:
        cache.begin(0, L)
        cache.store_prompt(0, 0, queries[:, :L], keys[:, :L], keys[:, :L], D**-0.5)

    def decode(position: int) -> None:
        held, positions = (cache.keys[0], cache.values[0]), torch.tensor([position])
        cache.claim(positions)
        made = torch.cat([queries[:, position], keys[:, position], keys[:, position]]).flatten()[None]
        unrotated = torch.ones(1, D, dtype=made.dtype), torch.zeros(1, D, dtype=made.dtype)
        query = append_token(made, *unrotated, *held, cache.lengths, positions, n_query_heads=HQ)
        cache.lengths += 1
        n = int(cache.lengths[0])
        decode_attention(query, *held, cache.lengths, D**-0.5, n, cache.state[MASS][0])

    def compare(t: int) -> None:
        n = int(cache.lengths[0])
        positions, order = cache.positions[0, 0, :, :n].sort(-1)
        if n > size:
            ranked = cache.state[MASS][0, 0, :, :n].gather(-1, order)[:, : n - p["recent"]]
            published = case["candidate_scores"][t]
            assert_scores(ranked.double(), published[:, : n - p["recent"]])
            run_round(cache, policy, size)
            n = size
            positions, order = cache.positions[0, 0, :, :n].sort(-1)
        assert positions.tolist() == [valid(row) for row in case["kept"][t]]
        assert_scores(cache.state[MASS][0, 0, :, :n].gather(-1, order).double(), case["mass_after"][t][:, :n])

    prefill()
    compare(0)
    for t in range(T):
        decode(L + t)
        compare(t + 1)


def check_streaming(case: Case) -> None:
    p = case.params
    size = p["sinks"] + p["recent"]
    policy = StreamingLLM(n_sink=p["sinks"])
    cache = one_row_cache(policy, 64, 1, 1, 2)
    seen = 0
    for event, (kind, n) in enumerate(p["events"]):
        if kind == "append":
            for _ in range(n):
                append(cache, seen)
                seen += 1
        elif {"trim": True, "space": True}[kind] and cache.lengths[0] + n > size:
            run_round(cache, policy, size - n)
        assert kept_positions(cache) == [valid(case["kept"][event])]


def check_kvfactory_streaming(case: Case) -> None:
    p = case.params
    assert (p["pooling"], p["group_reduce"]) == ("avgpool", "mean") and p["kernel"], "nothing is pooled or reduced"
    policy = StreamingLLM(n_sink=p["capacity"] - p["window"])
    cache = one_row_cache(policy, p["N"], 1, 1, 2)
    for position in range(p["N"]):
        append(cache, position)
    if not p["noop"]:
        run_round(cache, policy, p["capacity"])
    assert kept_positions(cache) * p["H"] == case["kept"].tolist()


@dataclass(frozen=True, kw_only=True)
class LowestDynTS(DynTS):
    """The paper's ablation that keeps the least important."""

    def score(self, view, state):
        scores, state = super().score(view, state)
        return -scores, state


def check_dynts(case: Case) -> None:
    p = case.params
    kind = {"dynts": DynTS, "dynts-bottom": LowestDynTS}[p["method"]]
    policy = kind(n_recent=p["n_recent"], ratio=p["ratio"], prompt_in_share=True, protect_prompt=False)
    for row, (n_prompt, answer_from) in enumerate(zip(case["prompt_len"], case["answer_from"], strict=True)):
        cache = one_row_cache(policy, p["kv_budget"] + 1, 1, 1, 2)
        for position in range(n_prompt):
            append(cache, position)
        pruned = []
        for t in range(p["steps"]):
            append(cache, n_prompt + t)
            answering = torch.tensor(answer_from >= 0 and t >= answer_from)
            score = torch.tensor(float(case["scores"][row, t])).masked_fill(answering, torch.inf)
            cache.state[IMPORTANCE][0, 0, 0, cache.lengths[0] - 1] = score
            if cache.lengths[0] > p["kv_budget"]:
                run_round(cache, policy, policy.keep(p["kv_budget"], n_prompt, 0), n_prompt)
                assert kept_positions(cache) == [valid(case["kept"][len(pruned)][row])]
                pruned.append(t)
        assert pruned == case["pruned_at"].tolist()


CHECKS = {
    **ATTENTION,
    **KEYS,
    "dynts": check_dynts,
    "h2o": check_h2o,
    "kvfactory_streaming": check_kvfactory_streaming,
    "rkv": check_rkv,
    "snapkv_decode": check_snapkv_decode,
    "streaming": check_streaming,
}


PROVEN = {
    "streaming": ["streaming", "kvfactory_streaming"],
    "streaming-reindexed": ["streaming"],
    "h2o": ["h2o"],
    "observed": ["kvpress_observedattention"],
    "tova": ["tova", "kvpress_tova"],
    "snapkv": ["snapkv_decode"],
    "snapkv-paper": ["snapkv_original", "kvfactory_snapkv", "kvfactory_pyramidkv"],
    "snapkv-kvpress": ["kvpress_snapkv"],
    "snapkv-vase": ["vase"],
    "rkv": ["rkv"],
    "rpc": ["rpc"],
    "rpc-qwen2": ["rpc"],
    "gkv": ["gkv"],
    "lazy": ["lazy"],
    "knorm": ["kvpress_knorm"],
    "keydiff": ["kvpress_keydiff"],
    "lagkv": ["kvpress_lagkv"],
    "cur": ["kvpress_cur"],
    "cur-resample": ["vase"],
    "vase": ["vase"],
    "expected": ["kvpress_expectedattention"],
    "triattention": ["triattention"],
    "triattention-per-layer": ["triattention"],
    "triattention-union": ["triattention"],
    "trimkv": ["trimkv"],
    "dynts-published": ["dynts"],
}
"""The files of vectors that prove a preset."""


def documented() -> dict[str, str]:
    """Label by preset, from the table of the policies' README."""
    lines = (Path(kvlib.policies.__file__).parent / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[3] for row in rows}


def test_every_preset_is_documented_with_the_label_it_has_earned():
    labels = documented()
    assert labels.keys() == PRESETS.keys()
    assert {name for name, label in labels.items() if label == "oracle"} == PROVEN.keys() <= PUBLISHED.keys()
    assert set(labels.values()) == {"reference", "oracle", "formula", "unverified"}


def test_every_file_proves_a_preset():
    assert {file for files in PROVEN.values() for file in files} == CHECKS.keys()


def check(file: str, case: Case) -> None:
    """Run a file's driver on a case; a parameter that it passes over could decide what the original kept."""
    CHECKS[file](case)
    assert not case.params.unread, f"the driver of {file} does not know {sorted(case.params.unread)}"


@pytest.mark.parametrize(("file", "case"), load_cases(), ids=lambda value: value)
def test_keeps_what_the_official_code_kept(file, case):
    check(file, Case(file, case))


def changed_parameters() -> list[tuple[str, str]]:
    """(file, parameter) of every parameter that is a word, and one that no driver knows."""
    first = {file: Case(file, case) for file, case in reversed(load_cases())}
    words = [(file, name) for file, case in first.items() for name in case.params if isinstance(case.params[name], str)]
    return sorted(
        (file, name) for file, name in [*words, *((file, "unheard_of") for file in first)] if name not in ABOUT
    )


@pytest.mark.parametrize(("file", "name"), changed_parameters())
def test_a_driver_refuses_a_parameter_or_mode_that_it_does_not_know(file, name):
    case = Case(file, "case0")
    case.params = Params({**case.params, name: "unheard of"})
    with pytest.raises((AssertionError, KeyError, ConfigError)):
        check(file, case)


def test_every_file_has_a_driver():
    assert CHECKS.keys() >= {file for file, _ in load_cases()}


def tampered_cases() -> list[tuple[str, str]]:
    """(file, array) of every first case that lists what was kept or scored."""
    found = []
    for file in {file: None for file, _ in load_cases()}:
        names = Case(file, "case0").names()
        scores = "scores64" if "scores64" in names else "scores"
        found += [(file, name) for name in ("kept", scores) if name in names and (file, name) != ("dynts", "scores")]
    return found


@pytest.mark.parametrize(("file", "name"), tampered_cases())
def test_a_tampered_vector_is_noticed(file, name, monkeypatch):
    """The check can fail: a kept slot or the scores that differ turn it red. (DynTS' scores are an input.)"""
    original = Case.__getitem__

    def tampered(case, key):
        array = original(case, key)
        if key != name:
            return array
        return array + (array >= 0) if name == "kept" else array * 1.01 + 0.01 * np.nanmax(np.abs(array))

    check(file, Case(file, "case0"))
    monkeypatch.setattr(Case, "__getitem__", tampered)
    with pytest.raises((AssertionError, IndexError)):
        check(file, Case(file, "case0"))


PUBLISHED = {
    "random-prompt": {"protect_prompt": True, "n_recent": 64, "buffer": 64, "share": "head"},
    "recency-prompt": {"protect_prompt": True},
    "streaming": {"n_sink": 4, "buffer": 0, "share": "model", "reindex": False},
    "streaming-reindexed": {"n_sink": 4, "buffer": 0, "reindex": True},
    "h2o": {"recent_ratio": 0.5, "buffer": 0, "per_query": False},
    "observed": {"per_query": True},
    "tova": {"buffer": 0, "share": "layer", "n_recent": 0, "protect_prompt": False},
    "snapkv": {"n_obs": 8, "n_recent": 8, "kernel": 7, "pooling": "max", "group": "logit_max", "domain": "older",
               "buffer": 128},
    "snapkv-paper": {"n_obs": 32, "n_recent": 32, "kernel": 5, "pooling": "avg", "domain": "all"},
    "snapkv-kvpress": {"n_obs": 64, "kernel": 5, "pooling": "avg", "group": "mean", "domain": "all", "buffer": 512},
    "snapkv-vase": {"n_obs": 64, "kernel": 5, "pooling": "avg", "group": "mean", "domain": "older", "buffer": 64},
    "morphkv": {"n_obs": 32, "kernel": 1, "domain": "all", "buffer": 0},
    "rkv": {"mix_lambda": 0.1, "threshold": 0.5, "n_obs": 8, "n_recent": 8, "kernel": 7, "buffer": 128},
    "rpc": {"interval": 1024, "n_obs": 32, "compression": 4, "kernel": 7, "protect_prompt": True, "share": "layer",
            "last_query_twice": False},
    "rpc-qwen2": {"last_query_twice": True},
    "gkv": {"decay": 0.8, "mix_lambda": 0.5, "n_obs": 16, "kernel": 1, "buffer": 128, "smooth": "max"},
    "lazy": {"alpha": 1e-4, "n_recent": 175},
    "raas": {"alpha": 1e-4, "protect_prompt": True},
    "caote": {"base": "tova"},
    "caote-snapkv": {"base": "snapkv"},
    "knorm": {"n_sink": 0, "n_recent": 0},
    "keydiff": {"n_sink": 0, "n_recent": 0},
    "lagkv": {"n_sink": 4, "lag_size": 128, "cross_scoring": False},
    "cur": {"n_sink": 4, "local_window": 16, "leverage": "kv_product", "resample": False},
    "cur-resample": {"resample": True, "local_window": 0, "n_recent": 64, "buffer": 64},
    "vase": {"n_sink": 4, "n_obs": 64, "n_recent": 64, "buffer": 64, "kernel": 5, "pooling": "avg", "large": 0.25,
             "magnitude": "range", "draw": True, "protect_prompt": False},
    "expected": {"n_sink": 4, "n_future": 512, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0},
    "triattention": {"share": "head_across_layers", "max_offset": 2**16, "normalise": True, "offset_reduce": "mean",
                     "buffer": 128, "protect_prompt": True},
    "triattention-per-layer": {"share": "head", "max_offset": 2**16},
    "triattention-union": {"share": "model", "max_offset": 2**16},
    "sepllm": {"n_sink": 4, "n_recent": 256, "share": "model"},
    "trimkv": {"buffer": 512, "use_knorm": False},
    "dynts": {"n_recent": 2000, "ratio": 0.4, "protect_prompt": True, "prompt_in_share": False, "share": "model"},
    "dynts-published": {"n_recent": 2000, "ratio": 0.4, "protect_prompt": False, "prompt_in_share": True},
}  # fmt: skip
"""The published settings, from the papers and the official code that the policies' README names."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_settings(name):
    policy = make_policy(name)
    assert {setting: getattr(policy, setting) for setting in PUBLISHED[name]} == PUBLISHED[name]
