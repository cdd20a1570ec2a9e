"""Tests with questions as the unit: sign flips, paired tests, concordance, and the order of two events.

    p = (b + 1) / (B + 1),    b: relabellings of B whose statistic is at least as extreme

Whole questions are relabelled, never pairs, so the correlation between the layers or positions of a question
stays. The largest statistic of each relabelling gives p-values for a family at once (Westfall & Young 1993).

**Order of two events.** Time is counted in steps (iterations or depths), a few per position. What happens
often comes before what happens seldom, so the null is that x is shuffled over the positions of its question.
Shuffling fixes how often x and y happen at each step, so only their table is drawn, cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binom, false_discovery_control, wilcoxon

from sst_interp.analyses.statistics.along_texts import ranks
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    questions_words,
    ratio,
    resample_weights,
)

_TIE = 1e-9
"""Statistics closer than this, relative to their size, are ties."""


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """An effect per member of a family, and how rarely a relabelling gives one as large."""

    estimate: np.ndarray
    """The mean difference, [...] as the family; NaN where there is none."""
    p_value: np.ndarray
    """Per member, as if it were the only one; NaN where not testable."""
    p_family: np.ndarray
    """Adjusted for the family by the largest statistic of each relabelling; never below `p_value`."""
    reason: str | None = None
    """Why nothing was tested; None if something was."""


def sign_flip(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> PermutationTest:
    """Whether paired differences are 0 on average: each question's sign is flipped at random.

    The null is that a question's differences are as likely as their opposites. The statistic is the mean over
    its standard error, two-sided.

    Args:
        differences: [question, ...], one difference per question and member; NaN where a question has none.
        resamples: B.
        seed: of the flips.

    Returns:
        Estimates are mean differences. A member with fewer than 2 questions, or whose differences are all 0,
        is not testable.
    """
    differences = np.asarray(differences, dtype=float)
    shape = differences.shape[1:]
    data = differences.reshape(len(differences), math.prod(shape))
    there = np.isfinite(data)
    values, n = np.where(there, data, 0.0), there.sum(axis=0)
    squares = (values**2).sum(axis=0)
    testable = (n >= 2) & (squares > 0)
    signs = np.random.default_rng(seed).integers(0, 2, size=(resamples, len(values))) * 2.0 - 1

    def distance(sums: np.ndarray) -> np.ndarray:
        """Mean over its standard error, without its sign; flips leave the sum of squares as it is."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = sums / np.sqrt(np.maximum(squares - sums**2 / n, 1e-12 * squares) * n / (n - 1))
        return np.where(testable, np.abs(t), -np.inf)

    estimate = np.divide(values.sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)
    alone = together = np.full(estimate.shape, np.nan)
    reason = "fewer than two questions with a difference other than 0"
    if testable.any():
        reason = None
        seen = np.where(testable, distance(values.sum(axis=0)), 0.0)
        seen = seen - _TIE * np.maximum(seen, 1)
        each = distance(signs @ values)
        count = (each >= seen).sum(axis=0), (each.max(axis=1)[:, None] >= seen).sum(axis=0)
        alone, together = (np.where(testable, (c + 1) / (resamples + 1), np.nan) for c in count)
    return PermutationTest(estimate.reshape(shape), alone.reshape(shape), together.reshape(shape), reason)


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted for their number by Holm's step-down rule; NaN (not tested) stays NaN, uncounted.

    statsmodels' `multipletests` gives the same numbers, half a second slower.
    """
    return _of_tested(p_values, _holm)


def _holm(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values: of those below 5%, at most 5% are false on average.

    NaN (not tested) stays NaN and does not count as a test. Never above Holm's.
    """
    return _of_tested(p_values, false_discovery_control)


def _of_tested(p_values: np.ndarray, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p = np.asarray(p_values, dtype=float)
    adjusted, tested = np.full(p.shape, np.nan), np.isfinite(p)
    if tested.any():
        adjusted[tested] = adjust(p[tested])
    return adjusted


def sign_test(above: ArrayLike, below: ArrayLike) -> np.ndarray:
    """Exact two-sided sign test, which is McNemar's of paired answers: counts [...] above and below the
    reference -> p-values [...]. Ties are left out beforehand; NaN where no question is left.
    """
    above, below = np.asarray(above), np.asarray(below)
    n = above + below
    return np.where(n > 0, np.minimum(1, 2 * binom.cdf(np.minimum(above, below), n, 0.5)), np.nan)


def rank_biserial(differences: np.ndarray) -> np.ndarray:
    """Matched-pairs rank-biserial correlation, the effect size of Wilcoxon's test: [question, k] -> [k].

    (W+ - W-) / (W+ + W-), W the sums of the ranks of positive and of negative differences: 1 if all questions
    are above, -1 if all are below, 0 if they balance. Questions without a difference are left out.
    """
    gaps = np.where(differences == 0, np.nan, differences)
    ranked = ranks(np.abs(gaps).T).T
    top = np.nansum(np.sign(gaps) * ranked, axis=0)
    bottom = np.nansum(ranked, axis=0)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def paired_tests(values: np.ndarray, reference: float = 0.0) -> pd.DataFrame:
    """Each column against a reference, questions as the unit, with control over the columns.

    Args:
        values: [question, k]; NaN where a question has none.
        reference: what there would be without an effect.

    Returns:
        A row per column: `questions`, `above` (share of questions above the reference; equal ones count as
        half), `effect` (`rank_biserial`), `sign_p` and `wilcoxon_p`, two-sided, and both adjusted over the
        columns: `sign_holm`, `sign_bh`, `wilcoxon_holm`, `wilcoxon_bh`. NaN where there is nothing to test.
    """
    values = np.asarray(values, dtype=float)
    gaps = values - reference
    n = np.isfinite(gaps).sum(axis=0)
    above, below = (gaps > 0).sum(axis=0), (gaps < 0).sum(axis=0)
    testable = above + below > 0
    wilcoxon_p = np.full(len(n), np.nan)
    if testable.any():
        some = np.where(gaps[:, testable] == 0, np.nan, gaps[:, testable])
        wilcoxon_p[testable] = wilcoxon(some, axis=0, nan_policy="omit").pvalue  # pyright: ignore
    p = {"sign": sign_test(above, below), "wilcoxon": wilcoxon_p}
    columns = {
        "questions": n,
        "above": np.divide(above + (n - above - below) / 2, n, out=np.full(len(n), np.nan), where=n > 0),
        "effect": rank_biserial(gaps),
    }
    columns |= {f"{name}_p": values for name, values in p.items()}
    for name, values in p.items():
        columns |= {f"{name}_holm": holm(values), f"{name}_bh": benjamini_hochberg(values)}
    return pd.DataFrame(columns)


MIN_QUESTIONS = 5
"""Events needed for an AUC at all: with fewer it is said to be not testable."""


class Concordance(NamedTuple):
    """How well one score says where the event is; higher scores are meant to go with the event."""

    within: Interval
    """AUC within questions, mean over the questions with an event that have an earlier position."""
    p_value: float
    """Two-sided; the event's position is drawn anew among the question's positions up to it."""
    across: Interval
    """AUC at the same position, over all pairs of a question with the event there and one that goes on."""


def concordance(
    question: np.ndarray,
    position: np.ndarray,
    event: np.ndarray,
    score: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Concordance:
    """Both AUCs of one score.

    Args:
        question: [row].
        position: [row].
        event: [row], true in at most one row of a question, its last.
        score: [row]; rows that are NaN are left out.
        resamples: question resamples, and redrawn event positions.
        seed: of both.
    """
    there = np.isfinite(score)
    question, position, event, score = (np.asarray(x)[there] for x in (question, position, event, score))
    within, p_value = _within(question, event.astype(bool), score, resamples, seed)
    return Concordance(
        within, p_value, _across(question, position, event.astype(bool), score, resamples, seed)
    )


def _within(
    question: np.ndarray, event: np.ndarray, score: np.ndarray, resamples: int, seed: int
) -> tuple[Interval, float]:
    codes, names = pd.factorize(question, sort=True)
    length = np.bincount(codes, minlength=len(names))
    usable = (np.bincount(codes, event, len(names)) == 1) & (length > 1)
    keep = usable[codes]
    codes, event, score = codes[keep], event[keep], score[keep]
    if usable.sum() < MIN_QUESTIONS:
        return _too_few(int(usable.sum())), math.nan
    # What the AUC of a question would be if the event were in this row.
    above = (pd.Series(score).groupby(codes).rank().to_numpy() - 1) / (length[codes] - 1)
    auc = above[event]
    interval = cluster_bootstrap(np.stack([auc, np.ones(len(auc))], 1), resamples=resamples, seed=seed)
    order = np.argsort(codes, kind="stable")
    above, length = above[order], length[usable]
    start = np.cumsum(length) - length
    rng = np.random.default_rng(seed)
    drawn = above[start + (rng.random((resamples, len(start))) * length).astype(int)].mean(axis=1)
    far = np.abs(drawn - 0.5) >= abs(auc.mean() - 0.5) - 1e-12
    return interval, float((far.sum() + 1) / (resamples + 1))


def _across(
    question: np.ndarray,
    position: np.ndarray,
    event: np.ndarray,
    score: np.ndarray,
    resamples: int,
    seed: int,
) -> Interval:
    """Linear in memory: one position at a time, [resample, question] for those still there."""
    codes, names = pd.factorize(question, sort=True)
    if not len(names):
        return _too_few(0)
    weights = resample_weights(len(names), resamples, seed)
    totals, exact, seen = np.zeros((resamples, 2)), np.zeros(2), np.zeros(len(names), dtype=bool)
    for at in np.unique(position[event]):
        here, on = (position == at) & event, (position == at) & ~event
        if not on.any():
            continue
        over = (score[here][:, None] > score[on]) + 0.5 * (score[here][:, None] == score[on])
        drawn, others = weights[:, codes[here]].astype(float), weights[:, codes[on]].astype(float)
        totals[:, 0] += ((drawn @ over) * others).sum(axis=1)
        totals[:, 1] += drawn.sum(axis=1) * others.sum(axis=1)
        exact += over.sum(), over.size
        seen[codes[here]] = True
    n = int(seen.sum())
    if n < MIN_QUESTIONS:
        return _too_few(n)
    defined = totals[:, 1] > 0
    low, high = np.quantile(totals[defined, 0] / totals[defined, 1], [0.025, 0.975])
    return Interval(float(exact[0] / exact[1]), float(low), float(high), n)


def _too_few(n: int) -> Interval:
    return Interval(math.nan, math.nan, math.nan, n, reason=f"not testable: only {questions_words(n)} of use")


ORDERS = ("before", "together", "after", "alone")
"""When x came, seen from y: at an earlier step, at the same, at a later one, never."""


def first_at(events: np.ndarray) -> np.ndarray:
    """The step at which something first holds: [position, step] -> [position]; the number of steps: never."""
    return np.where(events.any(axis=1), events.argmax(axis=1), events.shape[1])


def order_counts(question: np.ndarray, x: np.ndarray, y: np.ndarray, steps: int) -> np.ndarray:
    """Positions by question, step of x and step of y: int [question, steps + 1, steps + 1]; last: never.

    Args:
        question: [position].
        x: [position], from `first_at`.
        y: [position].
        steps: how many there are.
    """
    codes, names = pd.factorize(question)
    flat = (codes * (steps + 1) + x) * (steps + 1) + y
    shape = len(names), steps + 1, steps + 1
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


def orders(counts: np.ndarray) -> np.ndarray:
    """Of the positions where y happens, when x did: [..., x, y] -> [..., 4] in the order of `ORDERS`."""
    x, y = np.indices(counts.shape[-2:])
    never = counts.shape[-1] - 1
    masks = x < y, x == y, (y < x) & (x < never), x == never
    return np.stack([(counts * (mask & (y < never))).sum(axis=(-2, -1)) for mask in masks], axis=-1)


def shuffled_orders(counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Totals over questions with x shuffled over the positions of each: [question, x, y] -> [resample, x, y].

    Drawn cell by cell: how many of the positions with y at this step, and not yet given an x, get each x.
    """
    rng = np.random.default_rng(seed)
    n, kinds, _ = counts.shape
    left = np.broadcast_to(counts.sum(axis=2), (resamples, n, kinds)).copy()  # of every x, not yet given
    totals = np.zeros((resamples, kinds, kinds), dtype=np.int64)
    for j in range(kinds - 1):
        need = np.broadcast_to(counts[:, :, j].sum(axis=1), (resamples, n)).copy()
        others = left.sum(axis=2)
        for k in range(kinds - 1):
            others -= left[..., k]
            drawn = rng.hypergeometric(left[..., k], others, need)
            left[..., k] -= drawn
            need -= drawn
            totals[:, k, j] = drawn.sum(axis=1)
        left[..., -1] -= need
        totals[:, -1, j] = need.sum(axis=1)
    totals[:, :, -1] = left.sum(axis=1)
    return totals


def order_table(counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """When x came, of the positions where y happens, beside what shuffling x gives.

    Args:
        counts: [question, x, y] from `order_counts`; transpose the last two for the other way round.
        resamples: question resamples, and shuffles.
        seed: of both.

    Returns:
        A row per entry of `ORDERS`: positions, share, low, high (questions resampled), null (mean of the
        shuffles), null_low, null_high (their middle 95%), p (two-sided, of the shuffles; NaN without
        positions). Questions in which y never happens do not contribute.
    """
    seen = orders(counts)
    seen = seen[seen.sum(axis=1) > 0]
    sums = np.stack([seen, np.broadcast_to(seen.sum(axis=1, keepdims=True), seen.shape)], axis=-1)
    share, low, high = bootstrap_ends(sums, ratio, resamples, seed=seed)
    columns = {"order": ORDERS, "positions": seen.sum(axis=0), "share": share, "low": low, "high": high}
    drawn = orders(shuffled_orders(counts, resamples, seed)).astype(float)
    nothing = np.full(len(ORDERS), np.nan)
    null, ends, p = nothing, (nothing, nothing), nothing
    if len(seen):
        drawn /= drawn.sum(axis=1, keepdims=True)  # how often y happens is the same in every shuffle
        null, ends = drawn.mean(axis=0), np.quantile(drawn, [0.025, 0.975], axis=0)
        up, down = ((side * (drawn - share) >= -1e-12).sum(axis=0) for side in (1, -1))
        p = np.minimum(2 * (1 + np.minimum(up, down)) / (1 + resamples), 1)
    return pd.DataFrame({**columns, "null": null, "null_low": ends[0], "null_high": ends[1], "p": p})
