"""Selection and compaction keep exactly what they are told to, wherever it lies."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.engine.cache import CacheShape, SlotCache
from kvlib.engine.evict import select, share_scores
from kvlib.kernels.compact import compact
from kvlib.policies import Window


@given(seed=st.integers(0, 2**31), n=st.integers(2, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_compaction_keeps_every_survivor_once_and_moves_only_into_holes(seed, n, data):
    R, H, L = 3, 2, 2
    n_keep = torch.tensor([data.draw(st.integers(1, n - 1)) for _ in range(R)])
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(L, R, H, n, generator=generator).argsort(-1)
    keep = order < n_keep[None, :, None, None]
    tensor = torch.rand(L, 5, H, n + 3, 4, generator=generator)
    before, rows = tensor.clone(), torch.tensor([4, 0, 2])
    compact([tensor], rows, keep, n_keep)
    for layer in range(L):
        for i, row in enumerate(rows):
            for head in range(H):
                k = int(n_keep[i])
                survivors = before[layer, row, head, :n][keep[layer, i, head]]
                held = tensor[layer, row, head, :k]
                assert sorted(held[:, 0].tolist()) == sorted(survivors[:, 0].tolist())
                stayed = keep[layer, i, head, :k]
                assert torch.equal(held[stayed], before[layer, row, head, :k][stayed]), "survivors below do not move"
    untouched = [1, 3]
    assert torch.equal(tensor[:, untouched], before[:, untouched])
    assert torch.equal(tensor[:, :, :, n:], before[:, :, :, n:])


@given(seed=st.integers(0, 2**31), n=st.integers(3, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_select_keeps_the_protected_and_then_the_best(seed, n, data):
    n_keep = data.draw(st.integers(1, n - 1))
    n_protected = data.draw(st.integers(0, n_keep))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 1, 1, n, generator=generator)
    scores[..., ::3] = torch.inf
    protected = torch.rand(1, 1, 1, n, generator=generator).argsort(-1) < n_protected
    kept = select(scores, protected, torch.tensor([n_keep]))
    assert kept.sum() == n_keep
    assert kept[protected].all()
    free = ~protected
    if (kept & free).any() and (~kept & free).any():
        assert scores[kept & free].min() >= scores[~kept & free].max()


def test_the_newer_of_two_equals_stays():
    kept = select(torch.zeros(1, 1, 1, 6), torch.zeros(1, 1, 1, 6, dtype=torch.bool), torch.tensor([2]))
    assert kept[0, 0, 0].tolist() == [False] * 4 + [True] * 2


def test_protection_covers_sinks_prompt_and_recent():
    positions = torch.tensor([0, 1, 2, 5, 9, 10, 11]).view(1, 1, 1, 7)
    view = SimpleNamespace(positions=positions, n_prompt=torch.tensor([3]), kv_budget=9)
    mask = Window(n_sink=1, protect_prompt=True, n_recent=2).protection(view)
    assert mask[0, 0, 0].tolist() == [True, True, True, False, False, True, True]
    assert Window(n_sink=1).protection(view)[0, 0, 0].tolist() == [True] + [False] * 6
    assert Window(n_sink=1, protect_prompt=True, n_recent=2).protected(9, 3, 12) == [0, 1, 2, 10, 11]


def test_shared_scores_are_the_mean_over_what_is_shared():
    scores = torch.rand(3, 2, 4, 7)
    assert torch.equal(share_scores(scores, "head"), scores)
    torch.testing.assert_close(share_scores(scores, "layer")[:, :, 0], scores.mean(2))
    torch.testing.assert_close(share_scores(scores, "model")[0, :, 0], scores.mean((0, 2)))


def test_freed_slots_are_empty_and_lengths_follow():
    cache = SlotCache(CacheShape(1, 2, 1, 1, 6, 2), torch.float64, "cpu")
    cache.positions[0, :, 0] = torch.arange(6)
    cache.lengths[:] = 6
    keep = torch.tensor([False, True, False, False, True, True]).view(1, 1, 1, 6)
    cache.keep(torch.tensor([1]), keep, torch.tensor([3]))
    assert cache.positions[0, 1, 0].sort().values.tolist() == [-1, -1, -1, 1, 4, 5]
    assert cache.positions[0, 0, 0].tolist() == list(range(6))
    assert cache.lengths.tolist() == [6, 3]
