"""kvlib's policies keep what the official codes kept. `KVLIB_ORACLES` names another folder of vectors to check."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kvlib.attention import MASS, DecodeStep, PrefillStep
from kvlib.cache import CacheShape, SlotCache
from kvlib.policies import H2O, RKV, Policy, SnapKV, StreamingLLM, View, make_policy
from kvlib.policies.dynts import IMPORTANCE
from kvlib.select import evict

FOLDER = Path(os.environ.get("KVLIB_ORACLES") or Path(__file__).parent / "oracles")


def load_cases() -> list[tuple[str, str]]:
    """(file, case) pairs, in order."""
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        names = {name.split(".")[0] for name in np.load(path).files}
        found += [(path.stem, case) for case in sorted(names, key=lambda name: int(name[4:]))]
    return found


class Case:
    """One case of a file: params as attributes, arrays by name."""

    def __init__(self, file: str, case: str):
        self._arrays, self._case = np.load(FOLDER / f"{file}.npz"), case
        self.params = json.loads(str(self._arrays[f"{case}.params"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[f"{self._case}.{name}"]

    def double(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self[name]).double()


def one_row_cache(policy: Policy, n_slots: int, H: int, HQ: int, D: int, n_queries: int = 0) -> SlotCache:
    shared = policy.share == "model"
    shape = CacheShape(1, 1, H, HQ, n_slots, D, shared, shared, n_queries or policy.n_queries, policy.state_names)
    return SlotCache(shape, torch.float64, "cpu")


def inv_freq(D: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


def run_round(cache: SlotCache, policy: Policy, n_keep: int, n_prompt: int = 0, seen: int = 0) -> None:
    one = torch.tensor([1])
    evict(
        cache, policy, n_keep + (policy.buffer or 1), one * 0, int(cache.lengths[0]),
        n_prompt=one * n_prompt, n_keep=one * n_keep, request=one, step=one * seen, scaling=cache.shape.head_dim**-0.5,
        inv_freq=inv_freq(cache.shape.head_dim),
    )  # fmt: skip


def kept_positions(cache: SlotCache) -> list[list[int]]:
    n = int(cache.lengths[0])
    return cache.positions[0, 0, :, :n].sort(-1).values.tolist()


def valid(row: np.ndarray) -> list[int]:
    return row[row >= 0].tolist()


def assert_scores(ours: torch.Tensor, published: np.ndarray) -> None:
    largest = np.abs(published).max()
    np.testing.assert_allclose(ours.numpy(), published, rtol=1e-4, atol=1e-6 * largest)


def check_observing(case: Case, policy: Policy) -> None:
    """SnapKV and R-KV: one round on given keys and queries, the slots scrambled."""
    p = case.params
    queries, keys = case.double("q"), case.double("k")
    H, N, D = keys.shape
    if p["noop"]:
        pytest.skip("the original does nothing below its budget; the engine runs no round there (test_engine.py)")
    scramble = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    W, t = policy.n_obs, min(policy.n_obs, queries.shape[1])
    cache = one_row_cache(policy, N, H, queries.shape[0], D, n_queries=t)
    cache.keys[0, 0] = keys[:, scramble]
    cache.positions[0, 0] = scramble.int()
    cache.lengths[:] = N
    cache.ring[0, 0][:, torch.arange(N - t, N) % t] = queries[:, -t:]
    one = torch.tensor([1])
    view = View(
        p["budget"], torch.arange(N).expand(1, 1, H, N), one * 0, one * p["budget"], D**-0.5, inv_freq(D), one, one * N,
        torch.arange(N).expand(1, 1, H, N), keys[None, None], keys[None, None], cache.ring,
    )  # fmt: skip
    scores, _ = policy.score(view, {})
    assert_scores(scores[0, 0, :, : N - W], case["scores"])
    run_round(cache, policy, p["budget"], seen=N)
    assert kept_positions(cache) == case["kept"].tolist()


def check_rkv(case: Case) -> None:
    p = case.params
    check_observing(
        case,
        RKV(mix_lambda=p["lam"], threshold=p["threshold"], n_obs=p["window"], n_recent=p["window"], kernel=p["kernel"]),
    )


def check_snapkv_decode(case: Case) -> None:
    p = case.params
    check_observing(case, SnapKV(n_obs=p["window"], n_recent=p["window"], kernel=p["kernel"]))


def check_h2o(case: Case) -> None:
    p = case.params
    queries, keys = case.double("q"), case.double("k")
    L, T, H, HQ, D = p["prefill"], p["steps"], p["H"], p["HQ"], p["D"]
    size = p["heavy"] + p["recent"]
    policy = H2O(n_recent=p["recent"], recent_ratio=0.0)
    cache = one_row_cache(policy, max(L, size) + 1, H, HQ, D)

    def attend(step: PrefillStep | DecodeStep, tokens: slice) -> None:
        k = keys[None, :, tokens]
        k_all, v_all = step.update(k, k, 0)
        step.attend(0, queries[None, :, tokens], k_all, v_all, D**-0.5)

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

    attend(PrefillStep(cache, 0, L), slice(0, L))
    compare(0)
    for t in range(T):
        attend(DecodeStep(cache, torch.tensor([L + t])), slice(L + t, L + t + 1))
        cache.lengths += 1
        compare(t + 1)


def append(cache: SlotCache, position: int) -> None:
    DecodeStep(cache, torch.tensor([position]))
    cache.lengths += 1


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
        elif cache.lengths[0] + n > size:
            run_round(cache, policy, size - n)
        assert kept_positions(cache) == [valid(case["kept"][event])]


def check_kvfactory_streaming(case: Case) -> None:
    p = case.params
    policy = StreamingLLM(n_sink=p["capacity"] - p["window"])
    cache = one_row_cache(policy, p["N"], 1, 1, 2)
    for position in range(p["N"]):
        append(cache, position)
    if not p["noop"]:
        run_round(cache, policy, p["capacity"])
    assert kept_positions(cache) * p["H"] == case["kept"].tolist()


def check_dynts(case: Case) -> None:
    p = case.params
    rank = "lowest" if p["method"] == "dynts-bottom" else "highest"
    policy = make_policy("dynts-published", n_recent=p["n_recent"], ratio=p["ratio"], rank=rank)
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
    "dynts": check_dynts,
    "h2o": check_h2o,
    "kvfactory_streaming": check_kvfactory_streaming,
    "rkv": check_rkv,
    "snapkv_decode": check_snapkv_decode,
    "streaming": check_streaming,
}


@pytest.mark.parametrize(("file", "case"), load_cases(), ids=lambda value: value)
def test_keeps_what_the_official_code_kept(file, case):
    if file not in CHECKS:
        pytest.skip(f"kvlib has no preset for {file} yet")
    CHECKS[file](Case(file, case))


def test_every_preset_of_this_list_has_vectors():
    assert CHECKS.keys() <= {file for file, _ in load_cases()}
