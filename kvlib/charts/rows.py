"""What charts ask of the rows they draw, and how numbers read in their tables."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from kvlib.charts.sheet import FULL
from kvlib.errors import ConfigError
from kvlib.stats import require


def required(df: pd.DataFrame, columns: list[str], what: str, numbers: Iterable[str]) -> pd.DataFrame:
    """df itself. Raises ConfigError for a missing column, no rows, or a value of `numbers` that is not finite."""
    require(df, columns, what)
    for name in numbers:
        finite = np.isfinite(pd.to_numeric(df[name], errors="coerce"))
        refuse(df[~finite], name, "leave out what was not measured, every point is drawn")
    return df


def refuse(rows: pd.DataFrame, name: str, why: str) -> None:
    """Raises ConfigError with the value of `name` in the first of these rows, if there is one."""
    if len(rows):
        raise ConfigError(f"{name} of {place(rows.iloc[0])} is {rows[name].iloc[0]}: {why}")


def once(rows: pd.DataFrame, key: Sequence[str]) -> None:
    """Raises ConfigError where two rows have the same key."""
    twice = rows[rows.duplicated(key)]
    if len(twice):
        raise ConfigError(f"{place(twice.iloc[0], key)} is there twice; pass it once")


def alike(df: pd.DataFrame, names: Iterable[str]) -> None:
    """Raises ConfigError where the rows of one chart differ in one of these columns."""
    for name in names:
        if df[name].nunique(dropna=False) > 1:
            got = ", ".join(map(str, df[name].unique()))
            raise ConfigError(f"one {name} per chart, got {got}; pass the rows of one")


def place(row: Mapping, names: Sequence[str] = ("dataset", "arm")) -> str:
    """ "Chain-A, snapkv at KV budget 96" """
    words = ", ".join(str(row[name]) for name in names if name in row and name != "kv_budget")
    if "kv_budget" not in row:
        return words
    budget = budget_text(row["kv_budget"])
    return f"{words} at {budget if budget == FULL else f'KV budget {budget}'}"


def budget_text(budget: float | None) -> str:
    return FULL if pd.isna(budget) or math.isinf(budget) else f"{budget:.0f}"


def intervals(rows: pd.DataFrame, names: Sequence[str], form: str = "{:.1f}", missing: str = "–") -> list[str]:
    """By row, of the columns (mean, low, high): "mean (low to high)", or the mean alone where low is NaN."""
    means, lows, highs = (texts(rows[name], form, missing) for name in names)
    alone = rows[names[1]].isna()
    shown = zip(means, lows, highs, alone, strict=True)
    return [mean if lone else f"{mean} ({low} to {high})" for mean, low, high, lone in shown]


def order(cells: pd.DataFrame) -> pd.DataFrame:
    """In the order of a table: datasets as they come, KV budgets rising, the full cache last; of a budget the best."""
    place = pd.Categorical(cells["dataset"], cells["dataset"].unique())
    cells = cells.assign(place=place, kv_budget=cells["kv_budget"].astype(float))
    return cells.sort_values(["place", "kv_budget", "pass_at_1"], ascending=[True, True, False], kind="stable")


def texts(values: Iterable[float], form: str = "{:.0f}", missing: str = "–") -> list[str]:
    return [missing if pd.isna(value) else form.format(value) for value in values]


def signed(value: float, digits: int = 1) -> str:
    """A difference, with a true minus, and no sign where it is 0."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def signed_interval(row, digits: int = 1) -> str:
    """Of a row's difference, low and high; the difference alone where low is NaN."""
    difference, low, high = (signed(value, digits) for value in (row.difference, row.low, row.high))
    return difference if math.isnan(row.low) else f"{difference} ({low} to {high})"


def samples_text(counts: Iterable[int]) -> str:
    """ "1 sample per problem", "2 to 4 samples per problem" """
    low, high = min(counts), max(counts)
    number = low if low == high else f"{low} to {high}"
    return f"{number} sample{'s' if high > 1 else ''} per problem"
