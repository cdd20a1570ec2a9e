"""Bootstrap intervals with questions as the unit: pairs of one question are not independent.

A statistic of sums over questions (a share, a mean, a histogram's quantile) is computed for all resamples in
one matrix product, where a row of `weights` says how often each question was drawn (multinomial):

    totals[resample] = weights[resample, question] @ sums[question]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sst_interp.errors import SSTError

RESAMPLES = 2000
LEVEL = 0.95
ONE_QUESTION = "one question: no spread between questions to measure"

Statistic = Callable[[np.ndarray], np.ndarray]


class Resampling(NamedTuple):
    """How questions are resampled; `*resampling` are the last two arguments of every statistic here."""

    resamples: int = RESAMPLES
    """Bootstrap resamples, shuffles and permutations."""
    seed: int = 0
    """Of all three."""


@dataclass(frozen=True)
class Interval:
    """A number and its question-level bootstrap percentile interval."""

    estimate: float
    """The statistic of the data as it is."""
    low: float
    """Lower end; NaN where there is no interval."""
    high: float
    """Upper end; NaN where there is no interval."""
    n_questions: int
    """Questions that contribute."""
    level: float = LEVEL
    reason: str | None = None
    """Why there is no interval or no estimate; None where there is one."""

    @property
    def known(self) -> bool:
        """Whether the interval exists."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def text(self, percent: bool = False, digits: int = 3) -> str:
        """`14.2% [11.9%, 16.8%]`, or the estimate and the reason there is no interval."""

        def show(value: float) -> str:
            return percent_text(value) if percent else f"{value:.{digits}g}"

        if not math.isfinite(self.estimate):
            return f"none ({self.reason})" if self.reason else "none"
        if not self.known:
            return f"{show(self.estimate)} (no interval: {self.reason})"
        return f"{show(self.estimate)} [{show(self.low)}, {show(self.high)}]"

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain numbers (NaN is left to the JSON writer)."""
        return asdict(self)


def nothing(reason: str, n_questions: int = 0) -> Interval:
    """No number, and why there is none."""
    return Interval(math.nan, math.nan, math.nan, n_questions, reason=reason)


def questions_words(n: int) -> str:
    """`1 question`, `24 questions`."""
    return f"{n:,} question" + ("" if n == 1 else "s")


def percent_text(share: float) -> str:
    """A share as a percentage that never rounds a small number to 0 or a large one to 100."""
    if not math.isfinite(share):
        return "none"
    percent = 100 * share
    if percent and abs(percent) < 0.1:
        return f"{percent:.1g}%"
    if 99.9 < percent < 100:
        return f"{math.floor(percent * 1000) / 1000:g}%"
    return f"{percent:.1f}%"


@lru_cache(maxsize=8)
def resample_weights(n_questions: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each question is drawn in each resample: int64 [resample, question], rows sum to n.

    Read-only: every statistic of a run is computed on the same draws, which are made once.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=resamples)
    weights.flags.writeable = False
    return weights


def resampled(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Totals of every resample: `sums` [question, ...] -> [resample, ...]."""
    sums = np.asarray(sums, dtype=float)
    weights = resample_weights(len(sums), resamples, seed).astype(float)
    return (weights @ sums.reshape(len(sums), -1)).reshape(resamples, *sums.shape[1:])


def ratio(totals: np.ndarray) -> np.ndarray:
    """Numerator / denominator of the last axis [..., 2]; NaN where the denominator is 0."""
    top, bottom = totals[..., 0], totals[..., 1]
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def bootstrap_ends(
    sums: np.ndarray,
    statistic: Statistic = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate, lower and upper end for a statistic with any number of outputs.

    Args:
        sums: [question, ...], the per-question sums the statistic needs.
        statistic: totals [resample, ...] -> [resample, ...]; it sees the plain totals as one resample.
        resamples: number of bootstrap resamples.
        seed: of the resampling; the same seed gives the same weights for every statistic.

    Returns:
        Three arrays of the statistic's own shape. Resamples in which the statistic is NaN are left out. Ends
        are NaN with fewer than 2 questions.
    """
    sums = np.asarray(sums, dtype=float)
    estimate = statistic(sums.sum(axis=0, keepdims=True))[0]
    if len(sums) < 2:
        none = np.full(np.shape(estimate), np.nan)
        return estimate, none, none
    values = statistic(resampled(sums, resamples, seed))
    defined = np.isfinite(values).any(axis=0)
    tail = (1 - LEVEL) / 2
    ends = np.full((2, *np.shape(estimate)), np.nan)
    quantile = np.quantile if np.isfinite(values).all() else np.nanquantile  # the second is far slower
    ends[:, defined] = quantile(values[:, defined], [tail, 1 - tail], axis=0)
    return estimate, ends[0], ends[1]


def simultaneous_shares(
    sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of a family and a band that holds for all of them at once (max-T bootstrap over questions).

    In y = arcsin(sqrt(share)), where the spread of a share hardly depends on its size, every member gets
    plus or minus c standard errors; c is the 95% quantile, over resamples, of the largest deviation in
    standard errors. Members may be correlated. Bootstrap errors of few questions are too small: they are
    multiplied by sqrt(n / (n - 1)) and the ratio of Student's quantile to the normal one.

    Args:
        sums: [question, member, 2], how many pairs count and how many there are.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        Shares, lower and upper ends [member]. Ends are NaN with fewer than 2 questions and for a member
        without pairs; a resample counts by the members it has pairs of.
    """
    sums = np.asarray(sums, dtype=float)
    share = ratio(sums.sum(axis=0))
    there, n = np.isfinite(share), len(sums)
    if n < 2 or not there.any():
        return share, np.full(share.shape, np.nan), np.full(share.shape, np.nan)
    y = np.arcsin(np.sqrt(share))
    off = np.arcsin(np.sqrt(np.clip(ratio(resampled(sums, resamples, seed)), 0, 1))) - y
    known = np.isfinite(off)
    off = np.where(known, off, 0.0)
    error = np.sqrt((off**2).sum(axis=0) / np.maximum(known.sum(axis=0), 1))
    largest = (np.abs(off) / np.where(error > 0, error, np.inf)).max(axis=-1)
    tail = (1 + LEVEL) / 2
    small = math.sqrt(n / (n - 1)) * stats.t.ppf(tail, n - 1) / stats.norm.ppf(tail)
    half = small * np.quantile(largest, LEVEL) * error
    low, high = (np.sin(np.clip(y + side * half, 0, np.pi / 2)) ** 2 for side in (-1, 1))
    return share, low, high


def cluster_bootstrap(
    sums: np.ndarray,
    statistic: Statistic = ratio,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A percentile interval for one number, resampling questions (see `bootstrap_ends`).

    Args:
        sums: [question, k] per-question sums, for the default [question, 2]: how many pairs are
            shifted, and how many there are. Questions that contribute nothing should be left out.
        statistic: totals [resample, k] -> [resample].
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        An `Interval`. With no or one question its ends are NaN and `reason` says why; never an error.

    Raises:
        SSTError: if `sums` has no question axis.
    """
    sums = np.asarray(sums, dtype=float)
    if sums.ndim < 2:
        raise SSTError(
            f"per-question sums have shape {sums.shape}, not [question, k]", "give one row per question"
        )
    n = len(sums)
    if n == 0:
        return nothing("no questions")
    estimate, low, high = (float(v) for v in bootstrap_ends(sums, statistic, resamples, seed))
    reason = None
    if not math.isfinite(estimate):
        reason = "no such pairs"
    elif n == 1:
        reason = ONE_QUESTION
    return Interval(estimate, low, high, n, reason=reason)


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, q: float) -> np.ndarray:
    """Quantile read off histograms, linear within a bin: counts [..., bin], edges [bin + 1] -> [...].

    NaN where a histogram is empty. The error is below one bin width.
    """
    cumulative = np.cumsum(counts, axis=-1)
    total = cumulative[..., -1:]
    target = q * total
    index = np.minimum((cumulative < target).sum(axis=-1, keepdims=True), counts.shape[-1] - 1)
    inside = np.take_along_axis(counts, index, -1)
    before = np.take_along_axis(cumulative, index, -1) - inside
    fraction = np.divide(target - before, inside, out=np.zeros_like(target, dtype=float), where=inside > 0)
    value = edges[index] + fraction * np.diff(edges)[index]
    return np.where(total > 0, value, np.nan)[..., 0]


def mean_over_questions(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one number per question, resampling questions; NaN questions are left out."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return cluster_bootstrap(np.stack([values, np.ones(len(values))], 1), resamples=resamples, seed=seed)


def share_of_questions(flags: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Share of questions for which something holds: flags [question], 0, 1, or NaN where it is not known.

    Where it holds for all or for none a bootstrap gives an interval without width; its other end is then
    the one-sided exact bound (`none_seen_bound`).
    """
    share = mean_over_questions(flags, resamples, seed)
    if share.n_questions < 2 or share.estimate not in (0.0, 1.0):
        return share
    bound = none_seen_bound(share.n_questions)
    low, high = (0.0, bound) if share.estimate == 0 else (1 - bound, 1.0)
    return replace(share, low=low, high=high)


def none_seen_bound(n_questions: int) -> float:
    """The largest share of questions compatible with none in n: 1 - 0.05^(1/n) (one-sided, Clopper-Pearson).

    A bootstrap of zeros is [0, 0], which is no bound.
    """
    return 1.0 if n_questions < 1 else 1 - (1 - LEVEL) ** (1 / n_questions)


LEVELS = 256
"""A quantity with at most so many values is exact; the ends of another's interval are right to 1 / 256 of
the rows."""


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
    codes, names = pd.factorize(np.asarray(question)[there], sort=True)
    of_row, of_level = to_levels(values[there])
    n, k = len(names), len(of_level)
    if not n:
        return [nothing("no such positions")] * (len(groups) + len(contrasts))
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

    def interval(exact: float, low: float, high: float, n: int) -> Interval:
        if not math.isfinite(exact):
            return nothing("no such positions", n)
        if n < 2:
            return Interval(exact, math.nan, math.nan, n, reason=ONE_QUESTION)
        return Interval(exact, min(float(low), exact), max(float(high), exact), n)

    return [interval(*row) for row in zip(exact, low, high, questions, strict=True)]


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


def share(question: np.ndarray, shifted: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Share of pairs that are shifted, resampling questions."""
    codes, names = pd.factorize(question, sort=True)
    sums = np.stack(
        [np.bincount(codes, weights, len(names)) for weights in (shifted, np.ones(len(codes)))], 1
    )
    return cluster_bootstrap(sums, ratio, resamples, seed=seed)


def by(
    name: str,
    group: np.ndarray,
    question: np.ndarray,
    shifted: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Shift rate per position or layer, with question-level intervals.

    Args:
        name: of the first column.
        group: [pair], which position or layer.
        question: [pair].
        shifted: bool [pair].
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        Columns `name`, share, low, high, pairs, questions (that have such pairs), questions_shifted (the
        share of those with at least one shift there), band_low, band_high (`simultaneous_shares`: holds for
        all positions or layers at once).
    """
    codes, names = pd.factorize(question, sort=True)
    groups, values = pd.factorize(group, sort=True)
    n, k = len(names), len(values)
    each = (np.bincount(codes * k + groups, w, n * k) for w in (shifted, np.ones(len(codes))))
    counts = np.stack([count.reshape(n, k) for count in each], axis=-1)  # [question, group, 2]
    estimate, low, high = bootstrap_ends(counts, ratio, resamples, seed=seed)
    _, band_low, band_high = simultaneous_shares(counts, resamples, seed=seed)
    questions = (counts[..., 1] > 0).sum(axis=0)
    return pd.DataFrame(
        {
            name: values,
            "share": estimate,
            "low": low,
            "high": high,
            "pairs": counts[..., 1].sum(axis=0).astype(int),
            "questions": questions,
            "questions_shifted": (counts[..., 0] > 0).sum(axis=0) / questions,
            "band_low": band_low,
            "band_high": band_high,
        }
    )


class OverSeeds(NamedTuple):
    """A number over seeds: mean, 95% interval of the mean (Student's t: seeds are few), and range."""

    mean: float
    low: float
    """NaN with one seed."""
    high: float
    lowest: float
    highest: float
    n: int

    def text(self, sign: str = "") -> str:
        """`0.41 [0.38, 0.44]`."""
        form = f"{sign}.3g"
        if not self.n:
            return "none"
        ends = f" [{self.low:{form}}, {self.high:{form}}]" if math.isfinite(self.low) else " (one seed)"
        return f"{self.mean:{form}}{ends}"

    def columns(self, name: str) -> dict[str, float]:
        """As entries of a table's row: `name`, `name_low`, `name_high` (the interval)."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def over_seeds(values: Sequence[float] | np.ndarray) -> OverSeeds:
    """Mean and spread of one value per seed; those that are not finite are left out."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    n = len(x)
    if n == 0:
        return OverSeeds(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    half = math.nan
    if n > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    mean = float(x.mean())
    return OverSeeds(mean, mean - half, mean + half, float(x.min()), float(x.max()), n)


def seeds_words(n: int) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} seed" + ("" if n == 1 else "s")
