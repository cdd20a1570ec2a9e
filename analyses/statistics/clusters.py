"""Intervals that cover at 24 questions: the variance is taken between questions, the quantile from Student's
t.

A percentile bootstrap of 8 questions covers 0.855 instead of 0.95. Here a share is treated on the logit,
a quantile through the share of rows below it (Woodruff 1952), and a ratio by its linear approximation;
each has n - 1 degrees of freedom for n questions.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    ONE_QUESTION,
    Interval,
    Statistic,
    none_seen_bound,
    nothing,
)


def t_quantile(n: int) -> float:
    """Student's two-sided 95% quantile of n questions."""
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) if n > 1 else math.nan


def mean_t(values: np.ndarray) -> Interval:
    """Mean of one number per question [question], with Student's t; NaN questions are left out."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    n = len(values)
    if not n:
        return nothing("no questions")
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, reason=ONE_QUESTION)
    half = t_quantile(n) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def per_question(question: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sums of columns [row] over each question: [question, column]; questions in ascending order."""
    codes, names = pd.factorize(np.asarray(question), sort=True)
    return np.stack([np.bincount(codes, np.asarray(c, dtype=float), len(names)) for c in columns], axis=1)


def ratio_t(sums: np.ndarray) -> Interval:
    """A ratio of totals from its parts per question [question, 2]; questions without a denominator are left
    out.
    """
    sums = sums[sums[:, 1] > 0]
    n = len(sums)
    if not n:
        return nothing("no such rows")
    estimate = float(sums[:, 0].sum() / sums[:, 1].sum())
    if n == 1:
        return Interval(estimate, math.nan, math.nan, 1, reason=ONE_QUESTION)
    half = t_quantile(n) * _error(sums, estimate)
    return Interval(estimate, estimate - half, estimate + half, n)


def jackknife_t(sums: np.ndarray, statistic: Statistic) -> Interval:
    """A statistic of totals [resample, ...] from its parts per question [question, ...], each left out in
    turn.
    """
    n, whole = len(sums), sums.sum(axis=0)
    estimate = float(statistic(whole[None])[0])
    if n < 3 or not math.isfinite(estimate):
        return Interval(
            estimate, math.nan, math.nan, n, reason=ONE_QUESTION if n == 1 else "too few questions"
        )
    left = statistic(whole - sums)
    half = t_quantile(n) * math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    if not math.isfinite(half):
        return Interval(estimate, math.nan, math.nan, n, reason="it rests on one question")
    return Interval(estimate, estimate - half, estimate + half, n)


def cluster_share(question: np.ndarray, flags: np.ndarray) -> Interval:
    """Share of rows that are flagged, by cluster-t on the logit.

    Where all or none are, the other end is the exact bound for as many independent questions
    (`none_seen_bound`): rows of one question may all go together.
    """
    sums = per_question(question, flags, np.ones(len(flags)))
    raw = ratio_t(sums)
    share, n = raw.estimate, raw.n_questions
    if n < 2:
        return raw
    if share in (0.0, 1.0):
        bound = none_seen_bound(n)
        low, high = (0.0, bound) if share == 0 else (1 - bound, 1.0)
        return Interval(share, low, high, n)
    low, high = _logit_ends(share, _error(sums[sums[:, 1] > 0], share), n)
    return Interval(share, low, high, n)


def cluster_quantile(question: np.ndarray, values: np.ndarray, q: float) -> Interval:
    """The q-quantile of values [row], between the quantiles at both ends of the share of rows below it."""
    question, values = np.asarray(question), np.asarray(values, dtype=float)
    there = np.isfinite(values)
    question, values = question[there], values[there]
    if not len(values):
        return nothing("no such rows")
    estimate = float(np.quantile(values, q))
    below = 0.5 * (values < estimate) + 0.5 * (values <= estimate)  # ties count half
    sums = per_question(question, below, np.ones(len(values)))
    n = len(sums)
    if n < 2:
        return Interval(estimate, math.nan, math.nan, n, reason=ONE_QUESTION)
    share = float(np.clip(sums[:, 0].sum() / sums[:, 1].sum(), 1e-9, 1 - 1e-9))
    low, high = np.quantile(values, _logit_ends(q, _error(sums, share), n))
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), n)


def apart(one: Interval, other: Interval) -> Interval:
    """One - other, of two estimates with intervals of their own; taken as independent, which is the wider
    way.
    """
    if not one.known or not other.known:
        return nothing(str((other if one.known else one).reason), other.n_questions)
    half = math.hypot((one.high - one.low) / 2, (other.high - other.low) / 2)
    gap = one.estimate - other.estimate
    return Interval(gap, gap - half, gap + half, min(one.n_questions, other.n_questions))


def in_logs(interval: Interval, plus: float = 0.0) -> Interval:
    """An interval of a positive number (after adding `plus`) on the log scale."""
    low, at, high = (math.log(max(v + plus, 1e-30)) if math.isfinite(v) else math.nan
                     for v in (interval.low, interval.estimate, interval.high))  # fmt: skip
    return Interval(at, low, high, interval.n_questions, reason=interval.reason)


def in_factors(interval: Interval) -> Interval:
    """The inverse of `in_logs`: from logarithms to factors."""
    low, at, high = (math.exp(v) if math.isfinite(v) else math.nan
                     for v in (interval.low, interval.estimate, interval.high))  # fmt: skip
    return Interval(at, low, high, interval.n_questions, reason=interval.reason)


def _error(sums: np.ndarray, estimate: float) -> float:
    """Standard error of a ratio of totals, between questions."""
    n, rest = len(sums), sums[:, 0] - estimate * sums[:, 1]
    return math.sqrt(n / (n - 1) * float((rest**2).sum())) / float(sums[:, 1].sum())


def _logit_ends(share: float, error: float, n: int) -> tuple[float, float]:
    middle, half = math.log(share / (1 - share)), t_quantile(n) * error / (share * (1 - share))
    low, high = (1 / (1 + math.exp(-np.clip(middle + side * half, -700, 700))) for side in (-1, 1))
    return float(low), float(high)
