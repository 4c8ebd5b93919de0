"""How much KV cache does it take: per dataset the smallest KV budget that loses at most a margin to the full cache.

Budgets are tested from the largest down, each by a one-sided 5 % test over problems, and the first that fails ends it;
so at most 5 % of studies name a budget that truly loses more, however many are tried (a fixed sequence of tests:
Maurer, Hothorn, Lehmacher 1995). The test is Tango's score for paired shares (1998), which, unlike a bootstrap, allows
for losses that these problems happen not to show; its critical value is made exact over the unknown share of problems
that change (as in Lloyd and Moldovan 2008). With several samples a problem it is the same score with the likeliest
distribution of their shares. Never imports torch.
"""

import functools
import math

import numpy as np
import pandas as pd

from kvlib.errors import ConfigError

MARGIN = 5.0  # points
ALPHA = 0.05
Z95_ONE_SIDED = 1.6448536269514722
MOST_EXACT = 300
"""Problems up to which the critical value is computed; with more, that for so many is used: it nears the normal's."""


def margin_z(counts: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Score `[...]` against a loss of margin, above 0 where less was lost (Tango 1998, equation 2, for two values).

    counts `[..., 2 S + 1]`: problems by difference -S to S in right samples of S, KV budget minus full cache. margin:
    share lost, above -1 and below 1. The variance is that of the likeliest distribution with this loss; a total loss or
    win that no problem shows may be in it.
    """
    counts, margin = np.asarray(counts, float), np.asarray(margin, float)[..., None]
    n = counts.sum(-1, keepdims=True)
    away = np.linspace(-1, 1, counts.shape[-1]) + margin  # how far each difference is from -margin
    low, high = np.broadcast_arrays(-n / away[..., -1:], -n / away[..., :1])
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(counts > 0, counts * away / (n + middle * away), 0).sum(-1, keepdims=True)
        low, high = np.where(excess > 0, middle, low), np.where(excess > 0, high, middle)
    share = np.where(counts > 0, counts / np.maximum(n + low * away, 1e-300), 0)
    rest = np.clip(1 - share.sum(-1), 0, 1)
    edge = np.where((share * away).sum(-1) > 0, away[..., 0], away[..., -1])
    variance = (share * away**2).sum(-1) + rest * edge**2
    lead = ((counts * away).sum(-1, keepdims=True) / n)[..., 0]
    return np.where(variance > 1e-15, lead / np.sqrt(np.maximum(variance, 1e-15) / n[..., 0]), 0.0)


@functools.cache
def critical_z(n: int, margin: float) -> float:
    """The least score at which at most ALPHA of studies with n problems and this true loss pass, whatever share of the
    problems changes; inf where so few problems can never tell."""
    n = min(n, MOST_EXACT)
    losses, wins = (side.ravel() for side in np.indices((n + 1, n + 1)))
    losses, wins = losses[losses + wins <= n], wins[losses + wins <= n]
    z = margin_z(np.stack([losses, n - losses - wins, wins], -1), np.float64(margin))
    order = np.argsort(-z, kind="stable")
    order = order[z[order] > 1]
    losses, wins, z = losses[order], wins[order], np.round(z[order], 9)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = log_factorial[n] - log_factorial[losses] - log_factorial[wins] - log_factorial[n - losses - wins]
    worst = np.zeros(len(z))
    for win in np.concatenate([[1e-12], np.geomspace(1e-4, (1 - margin) / 2 - 1e-9, 120)]):
        lose, same = win + margin, max(1 - 2 * win - margin, 1e-300)
        chance = ways + losses * math.log(lose) + wins * math.log(win) + (n - losses - wins) * math.log(same)
        worst = np.maximum(worst, np.cumsum(np.exp(chance)))
    passed = np.searchsorted(worst, ALPHA, "right")  # scores that may pass; equal ones only together
    while 0 < passed < len(z) and z[passed] == z[passed - 1]:
        passed -= 1
    return max(float(z[passed - 1]), Z95_ONE_SIDED) - 1e-8 if passed else math.inf


def loss_bound(counts: np.ndarray, margin: float) -> np.ndarray:
    """One-sided 95 % bound `[...]` of the share lost: the least loss that the test rejects, at this margin's level."""
    n = int(np.sum(counts, -1).flat[0])
    z = critical_z(n, margin)
    z = Z95_ONE_SIDED if math.isinf(z) else z
    low, high = (np.full(np.shape(counts)[:-1], side) for side in (-1 + 1e-9, 1 - 1e-9))
    for _ in range(40):
        middle = (low + high) / 2
        tells = margin_z(counts, middle) >= z
        low, high = np.where(tells, low, middle), np.where(tells, middle, high)
    return high


def smallest_passing(counts: np.ndarray, margin: float) -> np.ndarray:
    """Index `[...]` of the smallest budget named, counts `[..., budgets, 2 S + 1]` with budgets rising; -1: none."""
    n = int(np.sum(counts, -1).flat[0])
    passes = margin_z(counts, np.float64(margin)) >= critical_z(n, margin)
    in_turn = np.logical_and.accumulate(passes[..., ::-1], -1).sum(-1)
    return np.where(in_turn > 0, passes.shape[-1] - in_turn, -1)


def difference_counts(verdicts: pd.DataFrame) -> tuple[list[float], np.ndarray]:
    """(KV budgets rising, counts `[budgets, 2 S + 1]`) of one dataset's verdicts, with the full cache as inf."""
    right = verdicts.pivot_table("correct", "problem", "kv_budget", aggfunc="sum").astype(float)
    n_samples = int(verdicts.groupby(["kv_budget", "problem"]).size().max())
    budgets = [budget for budget in sorted(right) if not math.isinf(budget)]
    if right.isna().any(axis=None) or len(verdicts) != right.size * n_samples:
        raise ConfigError("the KV budgets hold different problems or samples; compare cells that ran the same ones")
    differences = right[budgets].sub(right[math.inf], axis=0).astype(int).to_numpy() + n_samples
    return budgets, np.stack([np.bincount(column, minlength=2 * n_samples + 1) for column in differences.T])


def answers(
    verdicts: pd.DataFrame, cells: pd.DataFrame, margin: float = MARGIN, memory_gb: float | None = None
) -> pd.DataFrame:
    """One row per dataset: sentence, kv_budget (NaN: none named) and, where named, what it takes and yields.

    verdicts: as measured_verdicts returns them; cells: as measured_cells does, for memory, lengths and throughput.
    margin: points of Pass@1. memory_gb: for caches, in 10^9 bytes; None: what the full cache takes at the timed batch.
    Raises ConfigError for a margin not between 0 and 100, or a memory that is not positive.
    """
    if not 0 < margin < 100:
        raise ConfigError(f"margin is {margin:g}; give the points that may be lost, above 0 and below 100")
    if memory_gb is not None and not memory_gb > 0:
        raise ConfigError(f"memory_gb is {memory_gb:g}; give the memory for caches, above 0")
    rows = []
    for dataset, group in verdicts.groupby("dataset", sort=False):
        here = cells[cells["dataset"] == dataset]
        budget, sentence = _named(group, margin)
        row = {"dataset": dataset, "n": group["problem"].nunique(), "kv_budget": budget}
        if not math.isnan(budget):
            row |= _costs(here[here["kv_budget"] == budget].iloc[0], here[here["kv_budget"].isna()].iloc[0], memory_gb)
            sentence += row.pop("size")
        rows.append({**row, "sentence": f"{dataset}: {sentence}."})
    return pd.DataFrame(rows)


def answer_table(found: pd.DataFrame) -> pd.DataFrame:
    """What answers returns, as text, the sentence last."""
    names = {"dataset": "Dataset", "kv_budget": "KV budget", "sentence": "In words"}
    shown = found.rename(columns=names)
    shown["KV budget"] = [f"{budget:.0f}" if budget > 0 else "none named" for budget in shown["KV budget"]]
    return shown[sorted(shown, key="In words".__eq__)].fillna("").astype(str)


def needs_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """How many problems of each dataset are first solved at each KV budget (in most of their samples)."""
    rows = []
    for dataset, group in verdicts.groupby("dataset", sort=False):
        solved = group.groupby(["problem", "kv_budget"])["correct"].mean().unstack("kv_budget") > 0.5
        first = solved[sorted(solved)].idxmax(axis=1).where(solved.any(axis=1))
        counts = {"full cache only" if math.isinf(b) else f"{b:.0f}": str((first == b).sum()) for b in sorted(solved)}
        rows.append({"Dataset": dataset, **counts, "never": str(first.isna().sum())})
    return pd.DataFrame(rows).fillna("")


def _named(group: pd.DataFrame, margin: float) -> tuple[float, str]:
    """(the KV budget named or NaN, the sentence that says so and why)"""
    if not np.isinf(group["kv_budget"]).any():
        return math.nan, "there is no full cache to compare with; run its cell, with full_cache: true in the study"
    if np.isinf(group["kv_budget"]).all():
        return math.nan, "there is no KV budget to compare with the full cache; run a cell that has one"
    rate = 100 * group.loc[np.isinf(group["kv_budget"]), "correct"].mean()
    budgets, counts = difference_counts(group)
    n = counts[0].sum()
    if rate <= margin:
        return math.nan, (f"the full cache solves {rate:.1f} % of these {n} problems, no more than the margin of "
                          f"{margin:g} points, so they cannot tell what a KV budget loses")  # fmt: skip
    share = margin / 100
    named = int(smallest_passing(counts, share))
    at = named if named >= 0 else len(budgets) - 1
    bound = 100 * float(loss_bound(counts[at], share))
    loss = 100 * float(counts[at] @ np.linspace(1, -1, counts.shape[-1])) / n + 0.0
    evidence = f"loses {loss:.1f}, at most {bound:.1f} with 95 % confidence, n = {n}"
    if named >= 0:
        return budgets[named], (f"KV budget {budgets[named]:.0f} is the smallest of {len(budgets)} that loses at most "
                                f"{margin:g} points ({evidence}) to the full cache's {rate:.1f} %")  # fmt: skip
    # As much disagreement, but no loss: what these problems could tell at best.
    could = 100 * float(loss_bound((counts[at] + counts[at][::-1]) / 2, share))
    least = -100 * float(loss_bound(counts[at][::-1], share))
    if least <= margin and (could > margin or math.isinf(critical_z(n, share))):
        return math.nan, (f"these {n} problems cannot tell whether a KV budget loses at most {margin:g} points (they "
                          f"could tell a loss of {could:.1f}); the largest, {budgets[at]:.0f}, {evidence}")  # fmt: skip
    return math.nan, (f"none of the KV budgets tried is shown to lose at most {margin:g} points: the largest, "
                      f"{budgets[at]:.0f}, {evidence}")  # fmt: skip


def _costs(row, full, memory_gb: float | None) -> dict:
    """What the KV budget named takes and yields, beside the full cache, as text: "budget : full cache"."""
    length = full.mean_tokens + (0 if math.isnan(full.mean_prompt) else full.mean_prompt)
    of = "output" if math.isnan(full.mean_prompt) else "length"
    share, kib = f"{100 * row.kv_budget / length:.0f}", [f"{cell.bytes_per_row / 1024:,.0f}" for cell in (row, full)]
    costs = {"size": f": {share} % of its mean {of} of {length:.0f} tokens, {kib[0]} KiB a sequence against {kib[1]}",
             f"Of the full cache's mean {of} (%)": share, "KiB per sequence": " : ".join(kib)}  # fmt: skip
    timed = "throughput" in row.index and not math.isnan(row.throughput + full.throughput)
    if memory_gb is None and not timed:
        return costs
    memory = full.bytes_per_row * full.batch_size if memory_gb is None else 1e9 * memory_gb
    fits = [int(memory // cell.bytes_per_row) for cell in (row, full)]
    costs[f"Sequences in {memory / 1e9:.3g} GB"] = " : ".join(f"{count:,}" for count in fits)
    if timed:
        rates = [_solved(cell, count) for cell, count in zip((row, full), fits, strict=True)]
        costs["Solved per hour in it"] = " : ".join(rates)
    return costs


def _solved(cell, fits: int) -> str:
    """Solved problems per hour with so many rows, always filled: timed at this batch, or reckoned between tokens/s that
    do not grow with the rows and tokens/s that grow as they do."""
    per_hour = 3600 * cell.throughput / cell.mean_tokens * cell.pass_at_1 / 100
    if fits == cell.batch_size:
        return f"{_rounded(per_hour)} (timed)"
    low, high = sorted([per_hour, per_hour * fits / cell.batch_size])
    return f"{_rounded(low)} to {_rounded(high)} (reckoned)" if fits else "0"


def _rounded(value: float) -> str:
    """Three digits: more would be noise."""
    return f"{float(f'{value:.3g}'):,.0f}"
