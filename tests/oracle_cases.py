"""Reading oracle vectors, and the engine's pieces that drive one sequence through a policy. Shared by the drivers."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from kvlib.engine.cache import CacheShape, SlotCache
from kvlib.engine.evict import Round, evict, select, share_scores
from kvlib.policies import Policy, View

FOLDER = Path(os.environ.get("KVLIB_ORACLES") or Path(__file__).parent / "oracles")


def load_cases() -> list[tuple[str, str]]:
    """(file, case) pairs, in order."""
    found = []
    for path in sorted(FOLDER.glob("*.npz")):
        names = {name.split(".")[0] for name in np.load(path).files}
        found += [(path.stem, case) for case in sorted(names, key=lambda name: int(name[4:]))]
    return found


class Params(dict):
    """Parameters that note which of them a driver read."""

    def __init__(self, *given):
        super().__init__(*given)
        self.unread = self.keys() - ABOUT

    def __getitem__(self, name):
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.unread.discard(name)
        return super().get(name, default)


ABOUT = {
    "policy", "batch", "H", "HQ", "D", "N", "layers", "rounds", "margin_rel", "threshold_margin",
    "threshold_margin_rel", "max_abs_fp32_error", "pairs_above_threshold", "keys", "zero_query_rows", "padded_to",
    "prompt_overflows", "rope_base", "rope_scale", "n_kept", "n_selected", "T", "commit",
}  # fmt: skip
"""Parameters that describe the arrays, and decide nothing that they do not hold."""


class Case:
    """One case of a file: params and arrays by name."""

    def __init__(self, file: str, case: str):
        self._arrays, self._case = np.load(FOLDER / f"{file}.npz"), case
        self.params = Params(json.loads(str(self._arrays[f"{case}.params"])))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[f"{self._case}.{name}"]

    def names(self) -> set[str]:
        return {name.split(".", 1)[1] for name in self._arrays.files if name.startswith(f"{self._case}.")}

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
    due = Round(
        kv_budget=n_keep + (policy.buffer or 0), rows=one * 0, n_live=int(cache.lengths[0]), n_prompt=one * n_prompt,
        n_keep=one * n_keep, noise_key=one, n_seen=one * seen, scaling=cache.shape.head_dim**-0.5,
        inv_freq=inv_freq(cache.shape.head_dim),
    )  # fmt: skip
    _, finite = evict(cache, policy, due)
    assert finite


def kept_positions(cache: SlotCache) -> list[list[int]]:
    n = int(cache.lengths[0])
    return cache.positions[0, 0, :, :n].sort(-1).values.tolist()


def valid(row: np.ndarray) -> list[int]:
    return row[row >= 0].tolist()


def assert_scores(ours: torch.Tensor, published: np.ndarray) -> None:
    largest = np.abs(published).max()
    np.testing.assert_allclose(ours.numpy(), published, rtol=1e-4, atol=1e-6 * largest)


def append(cache: SlotCache, position: int) -> None:
    cache.claim(torch.tensor([position]))
    cache.lengths += 1


def view_of(
    keys: torch.Tensor,
    queries: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    *,
    n_keep: int = 0,
    positions: torch.Tensor | None = None,
    seen: int | None = None,
    n_prompt: int = 0,
    frequencies: torch.Tensor | None = None,
) -> View:
    """A view of rows in position order: keys, values `[L, R, H, N, D]`, queries `[L, R, HQ, W, D]` oldest first.

    positions `[L or 1, R, H or 1, N]`, default 0 .. N - 1; seen: tokens so far, default N.
    """
    L, R, H, N, D = keys.shape
    seen = N if seen is None else seen
    row = torch.ones(R, dtype=torch.int64)
    order = torch.arange(N).expand(1, R, 1, N)
    ring = torch.zeros(L, R, H, 0, D, dtype=keys.dtype) if queries is None else queries
    W = ring.shape[3]
    ring = ring.roll(seen % W, 3) if W else ring
    return View(
        kv_budget=n_keep,
        rows=torch.arange(R),
        n_live=N,
        positions=order if positions is None else positions,
        n_prompt=row * n_prompt,
        n_keep=row * n_keep,
        scaling=D**-0.5,
        inv_freq=inv_freq(D) if frequencies is None else frequencies,
        noise_key=row,
        n_seen=row * seen,
        _slots=order,
        _keys=keys,
        _values=keys if values is None else values,
        _ring=ring,
    )


def kept_by(policy: Policy, view: View, scores: torch.Tensor) -> torch.Tensor:
    """The keep mask that the engine selects from a policy's scores, in position order `[L or 1, R, H or 1, N]`."""
    scores = share_scores(scores, policy.share)
    return select(scores, policy.protection(view).expand(scores.shape), view.n_keep)
