"""Permutation tests with questions as the unit.

Under a null that makes questions exchangeable, so many relabelled data sets are as likely as the one seen:

    p = (b + 1) / (B + 1),    b: relabellings of B whose statistic is at least as extreme

so p is never 0 and, if the null holds, at most u in a share u of the tests. Whole questions are relabelled,
never pairs, so whatever correlation there is between the layers or positions of a question stays as it is.
For a family (layers, positions) the largest statistic of each relabelling gives p-values that hold for all
members at once (Westfall & Young 1993). All relabellings are one matrix product. A p-value says that there
is something; the `estimate` beside it, how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sst_interp.analyses.statistics.resampling import RESAMPLES
from sst_interp.errors import SSTError, unknown_name

Alternative = Literal["two-sided", "greater", "less"]
_SIDES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "two-sided": np.abs,
    "greater": np.asarray,
    "less": np.negative,
}
_TIE = 1e-9
"""Statistics closer than this, relative to their size, are ties."""


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """An effect per member of a family, and how rarely a relabelling gives one as large."""

    estimate: np.ndarray
    """The effect, [...] as the family: a mean difference, or a correlation. NaN where there is none."""
    p_value: np.ndarray
    """Per member, as if it were the only one; NaN where not testable."""
    p_family: np.ndarray
    """Adjusted for the family by the largest statistic of each relabelling; never below `p_value`."""
    n_questions: int
    """Questions that contribute to any member."""
    resamples: int
    reason: str | None = None
    """Why nothing was tested; None if something was."""


def sign_flip(
    differences: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    alternative: Alternative = "two-sided",
) -> PermutationTest:
    """Whether paired differences are 0 on average: each question's sign is flipped at random.

    The null is that a question's differences are as likely as their opposites (the two things compared are
    exchangeable within a question). The statistic is the mean over its standard error.

    Args:
        differences: [question, ...], one difference per question and member; NaN where a question has none.
        resamples: B.
        seed: of the flips.
        alternative: whether the mean is not 0, above 0 ("greater") or below it.

    Returns:
        Estimates are mean differences. Not testable: a member with fewer than 2 questions, or whose
        differences are all 0.

    Raises:
        SSTError: if `alternative` is unknown or there is no question axis.
    """
    data, shape = _flat(differences, alternative)
    there = np.isfinite(data)
    values, n = np.where(there, data, 0.0), there.sum(axis=0)
    squares = (values**2).sum(axis=0)
    testable = (n >= 2) & (squares > 0)
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(resamples, len(values))) * 2.0 - 1

    def standardised(sums: np.ndarray) -> np.ndarray:
        """Mean over its standard error; flips leave the sum of squares as it is."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = sums / np.sqrt(np.maximum(squares - sums**2 / n, 1e-12 * squares) * n / (n - 1))
        return np.where(testable, t, -np.inf)

    estimate = np.divide(values.sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)
    observed, drawn = standardised(values.sum(axis=0)), standardised(signs @ values)
    reason = None if testable.any() else "fewer than two questions with a difference other than 0"
    return _counted(estimate, observed, drawn, testable, there, shape, alternative, reason)


def label_permutation(
    values: np.ndarray,
    labels: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    alternative: Alternative = "two-sided",
) -> PermutationTest:
    """Whether values go with a label of the question: labels are permuted over questions.

    The statistic, and the estimate, is the correlation of value and label. For a label that is true or false
    that is the test of a difference of two means. Give ranks for a rank correlation.

    Args:
        values: [question, ...], without NaN.
        labels: [question], bool or numbers.
        resamples: B.
        seed: of the permutations.
        alternative: as in `sign_flip`.

    Returns:
        Not testable: fewer than 3 questions, labels that are all the same, or a member without spread.

    Raises:
        SSTError: if `alternative` is unknown, the sizes differ, or something is NaN.
    """
    data, shape = _flat(values, alternative)
    label = np.asarray(labels, dtype=float)
    if label.shape != (len(data),):
        raise SSTError(f"{len(data)} questions and labels of shape {label.shape}", "give one per question")
    if not (np.isfinite(data).all() and np.isfinite(label).all()):
        raise SSTError("a value or label is NaN", "leave such questions out, values and label alike")
    n = len(label)
    if n:
        data, label = data - data.mean(axis=0), label - label.mean()
    size, spread = np.sqrt((data**2).sum(axis=0)), math.sqrt(float((label**2).sum()))
    testable = (size > 0) & (spread > 0) & (n >= 3)
    data = np.divide(data, size, out=np.zeros_like(data), where=size > 0)
    label = label / spread if spread else label
    rng = np.random.default_rng(seed)
    permuted = rng.permuted(np.tile(label, (resamples, 1)), axis=1)
    observed = np.where(testable, label @ data, np.nan)
    drawn = np.where(testable, permuted @ data, -np.inf)
    reason = None
    if not testable.any():
        reason = "fewer than three questions, or no spread in the labels or the values"
    there = np.ones_like(data, dtype=bool)
    return _counted(observed, observed, drawn, testable, there, shape, alternative, reason)


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted for their number by Holm's step-down rule; NaN (not tested) stays NaN, uncounted."""
    p = np.asarray(p_values, dtype=float)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def _flat(values: np.ndarray, alternative: str) -> tuple[np.ndarray, tuple[int, ...]]:
    values = np.asarray(values, dtype=float)
    if alternative not in _SIDES:
        raise unknown_name("alternative", alternative, _SIDES)
    if not values.ndim:
        raise SSTError("a permutation test needs a question axis", "give one row per question")
    return values.reshape(len(values), math.prod(values.shape[1:])), values.shape[1:]


def _counted(
    estimate: np.ndarray,
    observed: np.ndarray,
    drawn: np.ndarray,
    testable: np.ndarray,
    there: np.ndarray,
    shape: tuple[int, ...],
    alternative: str,
    reason: str | None,
) -> PermutationTest:
    """P-values from the statistic of the data [member] and of every relabelling [resample, member]."""
    resamples = len(drawn)
    alone = together = np.full(estimate.shape, np.nan)
    if testable.any():
        side = _SIDES[alternative]
        seen = np.where(testable, side(observed), 0.0)
        seen = seen - _TIE * np.maximum(np.abs(seen), 1)
        each = np.where(testable, side(drawn), -np.inf)
        count = (each >= seen).sum(axis=0), (each.max(axis=1)[:, None] >= seen).sum(axis=0)
        alone, together = (np.where(testable, (c + 1) / (resamples + 1), np.nan) for c in count)
    n = int(there.any(axis=1).sum())
    return PermutationTest(
        estimate.reshape(shape), alone.reshape(shape), together.reshape(shape), n, resamples, reason
    )
