"""How much of a quantity's variance along a text does a label of the position account for?

The label is the position index itself, or the class of the token there. Each question is centred on its own
mean, y. The share is

    sum over labels of  n_label / n  *  mean of y y' over pairs of different questions with that label
    -------------------------------------------------------------------------------------------------
                                          mean of y^2

an intraclass correlation: 0 on average if the label says nothing, however many labels there are, and 1 if it
says all. What a label does in one question only does not count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst_interp.analyses.statistics.matching import circular_draws, circular_products, p_value, permutations
from sst_interp.analyses.statistics.profiles import over_questions
from sst_interp.analyses.statistics.resampling import RESAMPLES, Interval, ratio

WORK = 1e7
"""Cells that all shuffles of one test may touch: long texts get fewer shuffles, so that time stays linear."""
FEWEST = 200
"""Shuffles of a test, at least."""


class LabelShare(NamedTuple):
    """What a label accounts for; the interval resamples questions."""

    share: Interval
    by_position: float
    """The same share with the labels that *other* questions have at these positions, on average."""
    p_circular: float
    """Chance of so large a share if every question's values were shifted in a circle; NaN if not tested."""
    p_other: float
    """Chance of it with other questions' labels at the same positions; NaN if not tested."""


def centred(values: np.ndarray) -> np.ndarray:
    """Each row less its own mean: [question, position], NaN stays; all NaN where a row has fewer than 2."""
    there = np.isfinite(values)
    there &= there.sum(axis=1, keepdims=True) > 1
    filled = np.where(there, values, 0)
    n = np.maximum(there.sum(axis=1, keepdims=True), 1)
    return np.where(there, filled - filled.sum(axis=1, keepdims=True) / n, np.nan)


def varies(y: np.ndarray, values: np.ndarray) -> bool:
    """Whether centred values are more than rounding."""
    scale = np.nanmax(np.abs(np.where(np.isfinite(y), values, 0)), initial=0)
    return bool(np.nanmax(np.abs(y), initial=0) > 1e-12 * scale)


def explained(
    totals: np.ndarray,
    squares: np.ndarray,
    counts: np.ndarray,
    count_squares: np.ndarray,
    variance: np.ndarray,
) -> np.ndarray:
    """The share from sums over questions of y (and of their squares) and of counts per label [..., label].

    Pairs of different questions are all pairs less those of a question with itself. `variance` [...] is the
    mean of y^2.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = counts**2 - count_squares
        between = np.where(pairs > 0, (totals**2 - squares) / pairs, 0.0)
        share = (counts * between).sum(axis=-1) / counts.sum(axis=-1) / variance
    return np.where((pairs > 0).any(axis=-1), share, np.nan)


def _share(y: np.ndarray, sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> Interval:
    """The share with its interval, from sums and counts per question and label [question, label]."""
    own = np.stack([np.nansum(y**2, axis=1), np.isfinite(y).sum(axis=1)], axis=-1)

    def share(weights: np.ndarray) -> np.ndarray:
        w2 = weights**2  # a question drawn twice is no pair of questions
        return explained(weights @ sums, w2 @ sums**2, weights @ counts, w2 @ counts**2, ratio(weights @ own))

    return over_questions(len(y), share, resamples, seed)


def position_share(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> LabelShare:
    """The position index as the label: values [question, position]; NaN where there is none."""
    y = centred(values)
    y = y[np.isfinite(y).any(axis=1)]
    if not len(y) or not varies(y, values[np.isfinite(centred(values)).any(axis=1)]):
        return LabelShare(_nothing(len(y)), np.nan, np.nan, np.nan)
    there = np.isfinite(y)
    sums, counts = np.where(there, y, 0), there.astype(float)
    found = _share(y, sums, counts, resamples, seed)
    if len(y) < 2:
        return LabelShare(found, np.nan, np.nan, np.nan)
    order = np.argsort(~there, axis=1, kind="stable")
    packed = np.take_along_axis(sums, order, axis=1)  # gaps move to the end
    rank, length = np.cumsum(there, axis=1) - 1, there.sum(axis=1, keepdims=True)
    n, variance = counts.sum(axis=0), np.array((sums**2).sum() / counts.sum())
    draws = np.empty(int(np.clip(WORK / y.size, FEWEST, max(resamples, FEWEST))))
    rng = np.random.default_rng(seed)
    for i in range(len(draws)):
        start = (rng.random((len(y), 1)) * length).astype(int)
        moved = np.where(there, np.take_along_axis(packed, (rank + start) % length, axis=1), 0)
        draws[i] = explained(moved.sum(axis=0), (moved**2).sum(axis=0), n, n, variance)
    return LabelShare(found, np.nan, p_value(draws, found.estimate, sided=1), np.nan)


def class_share(
    values: np.ndarray, codes: np.ndarray, classes: int, resamples: int = RESAMPLES, seed: int = 0
) -> LabelShare:
    """A class as the label, with both nulls of `matching`.

    Args:
        values: [question, position]; NaN where there is none.
        codes: [question, position], the class 0 .. classes - 1; -1 where it is not known.
        classes: how many there are.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
    """
    kept = np.where(codes >= 0, values, np.nan)
    y = centred(kept)
    use = np.isfinite(y).any(axis=1)
    y, codes, n = y[use], codes[use], int(use.sum())
    if not n or not varies(y, kept[use]):
        return LabelShare(_nothing(n), np.nan, np.nan, np.nan)
    there = np.isfinite(y)
    filled = np.where(there, y, 0)
    labels = np.stack([there & (codes == k) for k in range(classes)], axis=1).astype(float)
    sums, counts = np.einsum("qp,qkp->qk", filled, labels), labels.sum(axis=2)
    found = _share(y, sums, counts, resamples, seed)
    if n < 2:
        return LabelShare(found, np.nan, np.nan, np.nan)
    square = (filled**2).sum(), there.sum()
    products, lengths = circular_products(y, np.where(there[:, None], labels, np.nan))
    totals, squares = circular_draws(products, lengths, resamples, seed)
    draws = explained(
        totals,
        squares,
        counts.sum(axis=0),
        (counts**2).sum(axis=0),
        np.full(resamples, square[0] / square[1]),
    )
    swapped = _other_questions(filled, there, labels, resamples, seed)
    return LabelShare(
        found, float(swapped.mean()), p_value(draws, found.estimate, 1), p_value(swapped, found.estimate, 1)
    )


def _other_questions(
    y: np.ndarray, there: np.ndarray, labels: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """The share with each question's labels replaced by those of another: [resample]."""
    n = len(y)
    drawn, rows = permutations(n, resamples, seed), np.arange(n)
    own, parts = there.astype(float), []
    for k in range(labels.shape[1]):
        sums, counts = (m @ labels[:, k].T for m in (y, own))
        for table in (sums, counts):
            taken = table[rows, drawn]
            parts.append((taken.sum(axis=1), (taken**2).sum(axis=1)))
    totals, squares, counts, count_squares = (
        np.stack([part[i] for part in parts[j::2]], axis=1) for j in (0, 1) for i in (0, 1)
    )
    square, known = ((m @ own.T)[rows, drawn].sum(axis=1) for m in (y**2, own))
    return explained(totals, squares, counts, count_squares, ratio(np.stack([square, known], axis=-1)))


def _nothing(n: int) -> Interval:
    reason = "nothing varies" if n else "no question has two positions"
    return Interval(np.nan, np.nan, np.nan, n, reason=reason)
