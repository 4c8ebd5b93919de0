"""Intervals of Pass@1, and paired comparison of arms on common random numbers. Never imports torch."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvlib.errors import ConfigError

Z95 = 1.959963984540054
N_BOOT = 10_000
COLUMNS = ["dataset", "kv_budget", "problem", "sample", "correct"]
PAIR_COLUMNS = ["dataset", "more", "fewer", "difference", "low", "high", "wins", "losses", "n_problems", "p", "differs"]


def wilson_interval(n_correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, in [0, 1]."""
    if n == 0:
        raise ValueError("no samples: an interval needs at least one")
    p, z2 = n_correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_1(verdicts: Iterable[tuple[str, bool]]) -> tuple[float, float, float]:
    """Mean verdict and its 95 % interval, in [0, 1], from (problem id, correct) pairs.

    Wilson at one sample per problem; at several, a bootstrap over problems (samples of a problem are not
    independent), 10,000 draws, seed 0.
    """
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for problem, correct in verdicts:
        by_problem[problem].append(correct)
    if not by_problem:
        raise ValueError("no samples: Pass@1 needs at least one")
    if all(len(samples) == 1 for samples in by_problem.values()):
        n_correct = sum(samples[0] for samples in by_problem.values())
        return n_correct / len(by_problem), *wilson_interval(n_correct, len(by_problem))
    correct = np.array([sum(samples) for samples in by_problem.values()])
    count = np.array([len(samples) for samples in by_problem.values()])
    draws = np.random.default_rng(0).integers(0, len(count), (N_BOOT, len(count)))
    means = correct[draws].sum(1) / count[draws].sum(1)
    return correct.sum() / count.sum(), *_percentiles(means)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval over resampled values; an interval of one value is none: NaN."""
    if len(values) == 1:
        return float(values[0]), math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(values), (N_BOOT, len(values)))
    return float(values.mean()), *_percentiles(values[draws].mean(1))


def pooled_difference(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """Pass@1 of arm A minus that of arm B over several cells, as _difference gives it.

    a, b: verdicts with the columns dataset, kv_budget, problem, sample, correct. Every cell (dataset, KV budget) weighs
    the same. Problems are resampled within their dataset with all their budgets together, because the cells of one
    problem are correlated. Samples are averaged within a problem; both arms meet the same resamples, since they share
    the problems. Raises ConfigError unless both arms hold the same problems and samples, each once, and for a problem
    that lacks a budget of its dataset.
    """
    right = []
    for frame, arm in ((a, "A"), (b, "B")):
        require(frame, COLUMNS, f"the verdicts of arm {arm}")
        if frame[COLUMNS].isna().any(axis=None):
            raise ConfigError(
                f"the verdicts of arm {arm} have an empty field; for the full cache give the KV budget it stands beside"
            )
        if frame.duplicated(COLUMNS[:-1]).any():
            raise ConfigError(f"arm {arm} has a sample twice; pass each (dataset, budget, problem, sample) once")
        right.append(frame.set_index(COLUMNS[:-1])["correct"].astype(bool).sort_index())
    if not right[0].index.equals(right[1].index):
        raise ConfigError("the arms hold different problems, samples or budgets; compare arms that ran the same ones")
    first, second = (marks.groupby(COLUMNS[:-2]).mean().unstack("kv_budget") for marks in right)
    leads = {name: lead.dropna(axis=1, how="all") for name, lead in (first - second).groupby(level="dataset")}
    n_cells = sum(lead.shape[1] for lead in leads.values())
    rng, mean, draws, per_problem = np.random.default_rng(0), 0.0, np.zeros(N_BOOT), []
    for name, lead in leads.items():
        if lead.isna().any(axis=None):
            raise ConfigError(f"a problem of {name} lacks one of its KV budgets; pass every budget of every problem")
        weight, values = lead.shape[1] / n_cells, lead.to_numpy().mean(1)
        mean += weight * values.mean()
        draws += weight * values[rng.integers(0, len(values), (N_BOOT, len(values)))].mean(1)
        per_problem.append(values)
    return _difference(mean, draws, np.concatenate(per_problem))


def differences_to(verdicts: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Every arm minus the baseline arm, best first: the column arm and those of _difference.

    verdicts: the columns of pooled_difference and arm. All arms meet the same resamples. Raises ConfigError for an
    unknown baseline, and as pooled_difference does.
    """
    require(verdicts, ["arm", *COLUMNS], "the verdicts")
    by_arm = dict(list(verdicts.groupby("arm", sort=False)))
    if baseline not in by_arm:
        raise ConfigError(f"no arm is called {baseline!r}; use one of {', '.join(map(str, by_arm))}")
    base, rows = by_arm.pop(baseline), []
    for arm, group in by_arm.items():
        try:
            rows.append({"arm": arm, **pooled_difference(group, base)})
        except ConfigError as error:
            raise ConfigError(f"{arm} (A) cannot be compared with {baseline} (B): {error}") from error
    if not rows:
        raise ConfigError(f"{baseline} is the only arm; add the verdicts of another one to compare it with")
    return pd.DataFrame(rows).sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def budget_differences(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Every two KV budgets of each dataset: Pass@1 at the larger minus at the smaller, in points, on the same problems.

    verdicts: one row per sample with COLUMNS; kv_budget is inf for the full cache. Columns returned: PAIR_COLUMNS, with
    more, fewer: the two budgets; difference to n_problems as in _difference; p by sign_flip_p; differs: whether p is
    significant at 5 % among all pairs of its dataset (Holm). Raises ConfigError unless all budgets of a dataset hold
    the same problems and samples, each once.
    """
    require(verdicts, COLUMNS, "the verdicts")
    rows = []
    for dataset, group in verdicts.groupby("dataset", sort=False):
        wide = group.pivot_table("correct", ["problem", "sample"], "kv_budget", aggfunc=["size", "mean"])
        if (wide["size"] != 1).any(axis=None):  # NaN where one is missing
            raise ConfigError(f"the budgets of {dataset} hold different samples; compare cells that ran the same ones")
        shares = wide["mean"].astype(float).groupby("problem").mean()
        n, n_samples = len(shares), len(wide) / len(shares)
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), N_BOOT) / n
        pairs = []
        for fewer, more in itertools.combinations(sorted(shares), 2):
            values = (shares[more] - shares[fewer]).to_numpy()
            p = sign_flip_p(np.rint(values * n_samples).astype(int))
            found = _difference(values.mean(), weights @ values, values)
            pairs.append({"dataset": dataset, "more": more, "fewer": fewer, **found, "p": p})
        differs = holm(np.array([pair["p"] for pair in pairs]))
        rows += [{**pair, "differs": bool(differ)} for pair, differ in zip(pairs, differs, strict=True)]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def _difference(mean: float, draws: np.ndarray, per_problem: np.ndarray) -> dict[str, float]:
    """Keys: difference, in points, with a 95 % percentile interval low to high over resampled problems; wins, losses:
    the problems on which the first, or the second, is right in more samples; n_problems."""
    # Sums in another order differ in the last bit; a resample that is zero must count as zero.
    low, high = _percentiles(np.round(draws, 12))
    return {
        "difference": 100 * float(mean),
        "low": 100 * low,
        "high": 100 * high,
        "wins": int((per_problem > 1e-12).sum()),
        "losses": int((per_problem < -1e-12).sum()),
        "n_problems": len(per_problem),
    }


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray) -> float:
    """How often a sum this far from 0 arises if each problem's difference had either sign with equal chance: exact.

    differences: whole numbers, one per problem. With one sample per problem it is McNemar's exact test. Unlike the
    bootstrap it does not claim too much for few problems: fewer than 6 that changed are never significant at 5 %.
    """
    sizes = np.abs(differences[differences != 0])
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # of the sums -reach to reach
    chances[reach] = 1
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chances[sums >= abs(int(differences.sum()))].sum()))


def holm(p: np.ndarray) -> np.ndarray:
    """Which of several tests are significant together at 5 %, by Holm's step-down rule."""
    order = np.argsort(p)
    passed = p[order] <= 0.05 / np.arange(len(p), 0, -1)
    significant = np.zeros(len(p), bool)
    significant[order] = np.logical_and.accumulate(passed)
    return significant


def worth_of_protection(verdicts: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Each arm with the prompt protected minus the same arm without, best first; columns as in differences_to."""
    rows = [differences_to(verdicts[verdicts["arm"].isin([arm, f"{arm}+prompt"])], arm) for arm in arms]
    return pd.concat(rows).sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def require(df: pd.DataFrame, columns: list[str], what: str) -> None:
    """Raises ConfigError for a missing column, or no rows."""
    missing = [name for name in columns if name not in df]
    if missing or df.empty:
        lacking = f"column {', '.join(missing)}" if missing else "rows"
        raise ConfigError(f"{what} lack {lacking}; pass rows with the columns {', '.join(columns)}")


RUN_TO_RUN = 0.01
"""What equal runs on an idle machine differ by, whatever their rounds say (results/bench/busy-machine.md): an arm that
lies elsewhere in memory is as much faster or slower in all of a run."""
BUSY = 0.03
"""Two arms of equal work that differ by more than this were not measured on a quiet machine."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one arm is as another, with a 95 % interval; low and high are None of too few rounds."""

    ratio: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, row: Mapping) -> "Ratio":
        """Of a record's row, which holds more."""
        return cls(row["ratio"], row["low"], row["high"])

    def __str__(self) -> str:
        interval = "too few rounds for an interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.ratio:.3f} ({interval})"


def paired_ratio(seconds: np.ndarray, against: np.ndarray) -> Ratio:
    """The speed of the arm that took `seconds` over that of the arm that took `against`, both `[rounds, windows]`.

    Window j of every round is the same work for one arm, and window j of round i was timed moments apart for both. A
    run's time is the sum of its windows' medians over the rounds. Interval: percentile bootstrap over rounds, window by
    window, both arms drawn together, and RUN_TO_RUN beside it; of a single round, or two of one window, there is none.
    """
    seconds, against = np.asarray(seconds, dtype=float), np.asarray(against, dtype=float)
    ratio = float(np.median(against, 0).sum() / np.median(seconds, 0).sum())
    n, n_windows = seconds.shape
    if n == 1 or seconds.size < 3:
        return Ratio(ratio, None, None)
    draws, window = np.random.default_rng(0).integers(n, size=(4000, n, n_windows)), np.arange(n_windows)
    sums = [np.median(arm[draws, window], 1).sum(1) for arm in (against, seconds)]
    low, high = _percentiles(sums[0] / sums[1])
    return Ratio(ratio, low / (1 + RUN_TO_RUN), high * (1 + RUN_TO_RUN))


def too_busy(control: Ratio) -> bool:
    """Whether a control arm of equal work was off 1 by more than BUSY, or by more than its interval.

    Then differences between the other arms may be the machine's.
    """
    beside = control.low is not None and (control.low > 1 or control.high < 1)
    return beside or abs(control.ratio - 1) > BUSY
