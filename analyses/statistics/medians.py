"""Medians with question-level intervals, of any quantity, for several groups of rows at once.

A bootstrap of a median needs the whole distribution of every question, and a run has too many rows to sort
2,000 times. So values become levels (the values themselves where there are few, else bins that hold the same
number of rows), and a resample's median is read off the sum of its questions' counts per level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.resampling import LEVEL, RESAMPLES, Interval, bootstrap_ends

LEVELS = 256
"""Most levels. A quantity with no more values than this (tokens replaced, of 100) is exact; of any other the
ends of an interval are right to 1 / 256 of the rows, whatever its scale."""


def to_levels(values: np.ndarray, levels: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """Level of every value, int [row], and the value of every level, ascending [level].

    Order is kept: a smaller value never has a higher level. A level's value is the median of its rows.
    """
    codes, unique = pd.factorize(values, sort=True)
    if len(unique) <= levels:
        return codes, np.asarray(unique, dtype=float)
    rows = np.bincount(codes)
    middle = np.cumsum(rows) - rows / 2
    bin_of = np.minimum((levels * middle / len(values)).astype(int), levels - 1)
    _, bin_of = np.unique(bin_of, return_inverse=True)  # ties can leave bins empty
    weight = np.cumsum(rows)
    first = np.flatnonzero(np.diff(bin_of, prepend=-1))
    last = np.append(first[1:], len(unique)) - 1
    before = np.append(0, weight)[first]
    at = np.searchsorted(weight, (before + weight[last]) / 2)
    return bin_of[codes], np.asarray(unique, dtype=float)[at]


def level_median(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Median of counts per level: counts [..., level], values [level] -> [...]; NaN where there are none.

    The mean of the two middle values where the number of rows is even, as everywhere.
    """
    cumulative = np.cumsum(counts, axis=-1)
    half = cumulative[..., -1:] / 2
    lower, upper = (cumulative < half).sum(-1), (cumulative <= half).sum(-1)
    last = len(values) - 1
    median = (values[np.minimum(lower, last)] + values[np.minimum(upper, last)]) / 2
    return np.where(half[..., 0] > 0, median, np.nan)


def grouped_medians(
    question: np.ndarray,
    values: np.ndarray,
    groups: Sequence[np.ndarray],
    contrasts: Sequence[tuple[int, int]] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Median of each group of rows, then the difference of medians of each contrast.

    Args:
        question: [row] which question a row belongs to.
        values: [row]; rows that are NaN are left out.
        groups: masks [row]; they may overlap and be empty.
        contrasts: (i, j) asks for the median of group i minus that of group j, both from the same resample.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        An `Interval` per group and per contrast. A group without rows has no estimate, one with rows of one
        question no interval; `reason` says so.
    """
    values = np.asarray(values, dtype=float)
    there = np.isfinite(values)
    groups = [np.asarray(group, dtype=bool)[there] for group in groups]
    codes, names = pd.factorize(np.asarray(question)[there])
    of_row, of_level = to_levels(values[there])
    n, k = len(names), len(of_level)
    if not n:
        return [_interval(math.nan, math.nan, math.nan, 0)] * (len(groups) + len(contrasts))
    counts = np.stack(
        [np.bincount(codes[g] * k + of_row[g], minlength=n * k).reshape(n, k) for g in groups], axis=1
    )

    def medians(totals: np.ndarray) -> np.ndarray:
        own = level_median(totals, of_level)
        return np.concatenate([own, *(own[..., [i]] - own[..., [j]] for i, j in contrasts)], axis=-1)

    _, low, high = bootstrap_ends(counts, medians, resamples, seed=seed)
    exact = [float(np.median(values[there][g])) if g.any() else math.nan for g in groups]
    exact += [exact[i] - exact[j] for i, j in contrasts]
    seen = counts.sum(axis=-1) > 0
    questions = [int(seen[:, i].sum()) for i in range(len(groups))]
    questions += [min(questions[i], questions[j]) for i, j in contrasts]
    return [_interval(*row) for row in zip(exact, low, high, questions, strict=True)]


def as_columns(**intervals: Interval) -> dict[str, float]:
    """Intervals as entries of a table's row: `name`, `name_low`, `name_high` for each."""
    row: dict[str, float] = {}
    for name, interval in intervals.items():
        row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def points_text(interval: Interval) -> str:
    """A difference of shares in percentage points with its sign: `-8.1 points [-12.3, -3.9]`."""
    if not math.isfinite(interval.estimate):
        return interval.text()
    words = f"{100 * interval.estimate:+.1f} points"
    if not interval.known:
        return f"{words} (no interval: {interval.reason})"
    return f"{words} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _interval(exact: float, low: float, high: float, n_questions: int) -> Interval:
    if not math.isfinite(exact):
        return Interval(math.nan, math.nan, math.nan, n_questions, LEVEL, "no such positions")
    if n_questions < 2:
        reason = "one question: no spread between questions to measure"
        return Interval(exact, math.nan, math.nan, n_questions, LEVEL, reason)
    return Interval(exact, min(float(low), exact), max(float(high), exact), n_questions)
