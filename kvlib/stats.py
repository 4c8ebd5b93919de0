"""Intervals of Pass@1, and paired comparison of arms on common random numbers. Never imports torch."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from kvlib.errors import ConfigError

Z95 = 1.959963984540054
N_BOOT = 10_000
COLUMNS = ["dataset", "kv_budget", "problem", "sample", "correct"]


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
    low, high = np.quantile(means, (0.025, 0.975))
    return correct.sum() / count.sum(), float(low), float(high)


def mean_interval(values: np.ndarray, n_boot: int = N_BOOT, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval over resampled values; an interval of one value is none: NaN."""
    if len(values) == 1:
        return float(values[0]), math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, len(values), (n_boot, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Pass@1 of arm A minus that of arm B, in points, with a 95 % percentile interval over resampled problems.

    wins, losses: problems on which A, or B, is right in more samples. p: twice the smaller share of resamples on either
    side of zero, at most 1; a guide beside the interval, not corrected for the number of arms compared.
    """

    difference: float
    low: float
    high: float
    wins: int
    losses: int
    n_problems: int
    p: float


def pooled_difference(a: pd.DataFrame, b: pd.DataFrame, n_boot: int = N_BOOT, seed: int = 0) -> Difference:
    """A minus B over several cells: verdicts with the columns dataset, kv_budget, problem, sample, correct.

    Every cell (dataset, KV budget) weighs the same. Problems are resampled within their dataset with all their budgets
    together, because the cells of one problem are correlated. Samples are averaged within a problem; both arms meet the
    same resamples, since they share the problems. Raises ConfigError unless both arms hold the same problems and
    samples, each once, and for a problem that lacks a budget of its dataset.
    """
    by_problem = _differences(a, b)
    weights = {
        name: group.shape[1] / sum(g.shape[1] for g in by_problem.values()) for name, group in by_problem.items()
    }
    per_problem = {name: group.mean(1) for name, group in by_problem.items()}
    rng = np.random.default_rng(seed)
    draws = np.zeros(n_boot)
    for name, values in per_problem.items():
        index = rng.integers(0, len(values), (n_boot, len(values)))
        draws += weights[name] * values[index].mean(1)
    # Sums in another order differ in the last bit; a resample that is zero must count as zero.
    draws = np.round(draws, 12)
    low, high = np.quantile(draws, (0.025, 0.975))
    every = np.concatenate(list(per_problem.values()))
    return Difference(
        difference=100 * float(sum(weights[name] * values.mean() for name, values in per_problem.items())),
        low=100 * float(low),
        high=100 * float(high),
        wins=int((every > 1e-12).sum()),
        losses=int((every < -1e-12).sum()),
        n_problems=len(every),
        p=float(min(1.0, 2 * min((draws <= 0).mean(), (draws >= 0).mean()))),
    )


def differences_to(verdicts: pd.DataFrame, baseline: str, n_boot: int = N_BOOT, seed: int = 0) -> pd.DataFrame:
    """Every arm minus the baseline arm, best first: the column arm and those of Difference.

    verdicts: the columns of pooled_difference and arm. All arms meet the same resamples. Raises ConfigError for an
    unknown baseline, and as pooled_difference does.
    """
    _require(verdicts, ["arm", *COLUMNS], "the verdicts")
    arms = list(verdicts["arm"].unique())
    if baseline not in arms:
        raise ConfigError(f"no arm is called {baseline!r}; use one of {', '.join(map(str, arms))}")
    base = verdicts[verdicts["arm"] == baseline]
    rows = []
    for arm in arms:
        if arm != baseline:
            try:
                difference = pooled_difference(verdicts[verdicts["arm"] == arm], base, n_boot, seed)
            except ConfigError as error:
                raise ConfigError(f"{arm} (A) cannot be compared with {baseline} (B): {error}") from error
            rows.append({"arm": arm, **asdict(difference)})
    if not rows:
        raise ConfigError(f"{baseline} is the only arm; add the verdicts of another one to compare it with")
    return pd.DataFrame(rows).sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def budget_differences(verdicts: pd.DataFrame, n_boot: int = N_BOOT, seed: int = 0) -> pd.DataFrame:
    """Every two KV budgets of each dataset: Pass@1 at the larger minus at the smaller, in points, on the same problems.

    verdicts: one row per sample with COLUMNS; kv_budget is inf for the full cache. Columns returned: dataset, more,
    fewer (the two budgets), difference, low, high, wins, losses, n_problems as in Difference; p by sign_flip_p;
    differs: whether p is significant at 5 % among all pairs of its dataset (Holm). Raises ConfigError unless all
    budgets of a dataset hold the same problems and samples, each once.
    """
    _require(verdicts, COLUMNS, "the verdicts")
    rows = []
    for dataset, group in verdicts.groupby("dataset", sort=False):
        wide = group.pivot_table("correct", ["problem", "sample"], "kv_budget", aggfunc=["size", "mean"])
        if (wide["size"] != 1).any(axis=None):  # NaN where one is missing
            raise ConfigError(f"the budgets of {dataset} hold different samples; compare cells that ran the same ones")
        shares = wide["mean"].astype(float).groupby("problem").mean()
        n, n_samples = len(shares), len(wide) / len(shares)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_boot) / n
        for fewer, more in itertools.combinations(sorted(shares), 2):
            per_problem = (shares[more] - shares[fewer]).to_numpy()
            low, high = np.quantile(weights @ per_problem, (0.025, 0.975))
            rows.append(
                {
                    "dataset": dataset,
                    "more": more,
                    "fewer": fewer,
                    "difference": 100 * per_problem.mean(),
                    "low": 100 * low,
                    "high": 100 * high,
                    "wins": int((per_problem > 1e-12).sum()),
                    "losses": int((per_problem < -1e-12).sum()),
                    "n_problems": n,
                    "p": sign_flip_p(np.rint(per_problem * n_samples).astype(int)),
                }
            )
    pairs = pd.DataFrame(rows)
    if len(pairs):
        pairs["differs"] = pairs.groupby("dataset")["p"].transform(lambda p: holm(p.to_numpy()))
    return pairs


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


def holm(p: np.ndarray, alpha: float = 0.05) -> np.ndarray:
    """Which of several tests are significant together at alpha, by Holm's step-down rule."""
    order = np.argsort(p)
    passed = p[order] <= alpha / np.arange(len(p), 0, -1)
    significant = np.zeros(len(p), bool)
    significant[order] = np.logical_and.accumulate(passed)
    return significant


def worth_of_protection(verdicts: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Each arm with the prompt protected minus the same arm without, best first; columns as in differences_to."""
    rows = [differences_to(verdicts[verdicts["arm"].isin([arm, f"{arm}+prompt"])], arm) for arm in arms]
    return pd.concat(rows).sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def _require(df: pd.DataFrame, columns: list[str], what: str) -> None:
    missing = [name for name in columns if name not in df]
    if missing or df.empty:
        raise ConfigError(
            f"{what} lack {'column ' + ', '.join(missing) if missing else 'rows'}; pass one row per sample with the "
            f"columns {', '.join(columns)}"
        )


def _differences(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, np.ndarray]:
    """{dataset: difference of the share of right samples `[problems, budgets]`}, problems sorted."""
    shares = []
    for frame, arm in ((a, "A"), (b, "B")):
        _require(frame, COLUMNS, f"the verdicts of arm {arm}")
        if frame[COLUMNS].isna().any(axis=None):
            raise ConfigError(
                f"the verdicts of arm {arm} have an empty field; for the full cache give the KV budget it stands beside"
            )
        if frame.duplicated(COLUMNS[:-1]).any():
            raise ConfigError(f"arm {arm} has a sample twice; pass each (dataset, budget, problem, sample) once")
        shares.append(frame.assign(correct=frame["correct"].astype(bool)).set_index(COLUMNS[:-1])["correct"])
    if len(shares[0]) != len(shares[1]) or not shares[0].index.sort_values().equals(shares[1].index.sort_values()):
        raise ConfigError("the arms hold different problems, samples or budgets; compare arms that ran the same ones")
    first, second = (share.groupby(COLUMNS[:-2]).mean().unstack("kv_budget") for share in shares)
    result = {}
    for dataset, group in (first - second).groupby(level="dataset", sort=True):
        budgets = [budget for budget in group if group[budget].notna().any()]
        values = group[budgets].to_numpy()
        if np.isnan(values).any():
            raise ConfigError(f"a problem of {dataset} lacks one of its KV budgets; pass every budget of every problem")
        result[dataset] = values
    return result


BUSY = 0.03
"""Two arms of equal work that differ by more than this were not measured on a quiet machine."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one arm is as another, with a 95 % interval; low and high are None of too few rounds."""

    ratio: float
    low: float | None
    high: float | None


def paired_ratio(seconds: np.ndarray, against: np.ndarray, n_boot: int = 4000, seed: int = 0) -> Ratio:
    """The speed of the arm that took `seconds` over that of the arm that took `against`, both `[rounds, windows]`.

    Window j of every round is the same work for one arm, and window j of round i was timed moments apart for both. A
    run's time is the sum of its windows' medians over the rounds. Percentile bootstrap over rounds, window by window,
    both arms drawn together; of a single round, or two of one window, there is none.
    """
    seconds, against = np.asarray(seconds, dtype=float), np.asarray(against, dtype=float)
    ratio = float(np.median(against, 0).sum() / np.median(seconds, 0).sum())
    n, n_windows = seconds.shape
    if n == 1 or seconds.size < 3:
        return Ratio(ratio, None, None)
    draws, window = np.random.default_rng(seed).integers(n, size=(n_boot, n, n_windows)), np.arange(n_windows)
    sums = [np.median(arm[draws, window], 1).sum(1) for arm in (against, seconds)]
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return Ratio(ratio, float(low), float(high))


def too_busy(control: Ratio) -> bool:
    """Whether a control arm of equal work was off 1 by more than BUSY, or by more than its interval and 1 % beside it.

    Then differences between the other arms may be the machine's.
    """
    beside = control.low is not None and (control.low > 1.01 or control.high < 0.99)
    return beside or abs(control.ratio - 1) > BUSY
