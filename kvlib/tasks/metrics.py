"""pass@k, maj@k and avg@k of recorded cells, with intervals over problems. Never imports torch."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib.errors import ConfigError
from kvlib.record import read_record
from kvlib.stats import mean_interval, wilson_interval
from kvlib.tasks.grade import comparer

ANSWERS = {"correct": "answer", "strict_correct": "strict_answer"}
"""By verdict, the answer that it judges."""
NO_ANSWER = "-"
NO_AGREEMENT = (
    "the record does not say which samples agree (an older kvlib wrote it): move it away and run the study again"
)


def agreement_of(samples: list[dict]) -> dict[str, dict[str, str]]:
    """By verdict and problem, a mark per sample: one letter per answer by the grader's own equality, "-" for none.

    "aab-": two agree, one differs, one has no answer. Empty where no problem has two samples.
    """
    found: dict[str, dict[str, str]] = {}
    if len({sample["problem"] for sample in samples}) == len(samples):
        return found
    for verdict in ANSWERS.keys() & samples[0].keys():
        equal = comparer().as_published if verdict == "correct" else comparer().strictly
        answers: dict[str, list[tuple]] = defaultdict(list)  # those of a problem, in the order of their letters
        marks: dict[str, str] = defaultdict(str)
        for sample in samples:
            answer, is_right, known = sample[ANSWERS[verdict]], sample[verdict], answers[sample["problem"]]
            mark = NO_ANSWER
            if answer is not None:
                same = (
                    i
                    for i, (other, was_right) in enumerate(known)
                    if is_right == was_right and (is_right or answer == other or equal(other, answer) is True)
                )
                i = next(same, len(known))
                if i == len(known):
                    known.append((answer, is_right))
                mark = chr(ord("a") + i if i < 26 else 0x100 + i)  # beyond z, single signs of other alphabets
            marks[sample["problem"]] += mark
        found[verdict] = dict(marks)
    return found


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: unbiased (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(marks: str, right: Sequence[bool], k: int) -> float:
    """The chance that the most frequent answer of k of the samples is right: the mean over all subsets, exact.

    marks: as in agreement_of; right: a verdict per sample. A sample without an answer has no vote, a tie is decided by
    lot, and where nobody votes nothing is right.
    """
    sizes = Counter(marks)
    total = 0.0
    for winner in {mark for mark, is_right in zip(marks, right, strict=True) if is_right}:
        for votes in range(1, min(sizes[winner], k) + 1):
            ways = {(votes, 1): math.comb(sizes[winner], votes)}  # by samples drawn and answers with the most votes
            for other in sizes.keys() - {winner}:
                most = sizes[other] if other == NO_ANSWER else min(votes, sizes[other])
                grown: Counter = Counter()
                for (drawn, tied), count in ways.items():
                    for more in range(min(most, k - drawn) + 1):
                        ties = tied + (other != NO_ANSWER and more == votes)
                        grown[drawn + more, ties] += count * math.comb(sizes[other], more)
                ways = grown
            total += sum(count / tied for (drawn, tied), count in ways.items() if drawn == k)
    return total / math.comb(len(marks), k)


def by_problem(marks: dict[str, str], agreement: dict[str, str] | None, k: int) -> dict[str, np.ndarray]:
    """{"pass@k", "maj@k", "avg@k": a value per problem, in [0, 1]} from a record's verdicts and agreement.

    avg@k is the share of right samples, whose expectation is the same for every k; maj@k is NaN without agreement.
    """
    right = {problem: [mark == "1" for mark in found] for problem, found in marks.items()}
    if agreement is None and max(map(len, marks.values())) == 1:
        agreement = dict.fromkeys(marks, "a")
    voted = [maj_at_k(agreement[problem], found, k) if agreement else math.nan for problem, found in right.items()]
    return {
        f"pass@{k}": np.array([pass_at_k(len(found), sum(found), k) for found in right.values()]),
        f"maj@{k}": np.array(voted),
        f"avg@{k}": np.array([sum(found) / len(found) for found in right.values()]),
    }


def metrics(root: Path | str, ks: Sequence[int] = (), verdict: str = "correct") -> pd.DataFrame:
    """A row per metric of every finished cell below root: folder, model, dataset, policy, kv_budget, seed, metric,
    value, low, high (in [0, 1]), n_problems, n_samples, note.

    low, high: 95 % over problems, Wilson where each problem's value is 0 or 1, else a bootstrap. ks: numbers of
    samples; by default the powers of two up to n_samples, and n_samples. verdict: "correct" (published rules, or a
    chain's checker) or "strict_correct". maj@k is NaN, and note says why, where a record lacks what it needs. Raises
    RecordError for a damaged record, ConfigError for what a record does not hold.
    """
    rows = []
    for path in sorted(Path(root).rglob("record.json")):
        record = read_record(path.parent)
        if record.get("kind", "cell") != "cell":
            continue
        marks = record.get("verdicts", {}).get(verdict)
        if not marks:
            raise ConfigError(f"{path} holds no verdicts {verdict!r} by problem; use correct, or run the study again")
        n = min(map(len, marks.values()))
        own = {name: record["config"].get(name) for name in ("model", "dataset", "policy", "kv_budget", "seed")}
        for k in ks or sorted({2**i for i in range(n.bit_length())} | {n}):
            if not 1 <= k <= n:
                raise ConfigError(f"k is {k} and {path} has {n} samples a problem; use 1 to {n}, or raise n_samples")
            for metric, values in by_problem(marks, record.get("agreement", {}).get(verdict), k).items():
                value, low, high = mean_interval(values)
                if np.isin(values, (0, 1)).all():
                    low, high = wilson_interval(int(values.sum()), len(values))
                result = {"metric": metric, "value": value, "low": low, "high": high, "n_problems": len(values)}
                note = NO_AGREEMENT if math.isnan(value) else ""
                rows.append({"folder": str(path.parent), **own, **result, "n_samples": n, "note": note})
    return pd.DataFrame(rows)
