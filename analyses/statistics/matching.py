"""Do two things that are known at every position of a text go together, beyond what the position gives?

Two nulls, since each leaves something in that the other takes out. All numbers are means over questions.

- **Circular**: within each question one of the two is shifted in a circle by a random number of positions.
  Keeps how fast each changes along a text; removes every alignment, also the one that both merely start high.
- **Other questions**: one question's x with another question's y at the same positions. Keeps whatever the
  position index alone brings about; removes what the two share because they come from one text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst_interp.analyses.statistics.profiles import over_questions, pair_mean, ranks, standardised
from sst_interp.analyses.statistics.resampling import RESAMPLES, Interval, ratio

MIN_POSITIONS = 8
"""A question with fewer positions than this has no correlation along its text."""
SLACK = 1e-9
"""Statistics that differ by less are ties: the sums are taken in different orders."""


class Matched(NamedTuple):
    """A correlation along texts, of the same question against other questions."""

    matched: Interval
    """Mean over questions of the correlation of a question's x with its own y."""
    mismatched: float
    """Mean over pairs of different questions: what the position alone gives."""
    beyond: Interval
    """matched - mismatched."""
    p_circular: float
    """Two-sided, under circular shifts; NaN where it was not tested (two runs have no common text)."""
    p_other: float
    """Two-sided, under permutations of which question's y belongs to which x; NaN below 2 questions."""


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of every x row with every y row: [n, position], [n, position] -> [n, n].

    Over the positions both have, at least `MIN_POSITIONS`; NaN where there are fewer, or nothing varies.
    """
    mx, my = np.isfinite(x), np.isfinite(y)
    x, y = (np.where(m, v, 0) for m, v in ((mx, x), (my, y)))
    # Centring first keeps the differences of squares below accurate; it changes no correlation.
    x, y = (v - m * (v.sum(1) / np.maximum(m.sum(1), 1))[:, None] for m, v in ((mx, x), (my, y)))
    mx, my = mx.astype(float), my.astype(float)
    n = mx @ my.T
    with np.errstate(divide="ignore", invalid="ignore"):
        sx, sy = x @ my.T, mx @ y.T
        vx, vy = x**2 @ my.T - sx**2 / n, mx @ (y**2).T - sy**2 / n
        top = x @ y.T - sx * sy / n
        flat = (vx <= 1e-12 * (x**2 @ my.T)) | (vy <= 1e-12 * (mx @ (y**2).T))
        found = top / np.sqrt(vx * vy)
    return np.where(flat | (n < MIN_POSITIONS), np.nan, found)


def circular_products(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of x times y shifted in a circle by every number of positions, per question.

    Args:
        x: [question, position], NaN where there is none; gaps are closed up.
        y: [question, k, position].

    Returns:
        [question, k, offset], and the number of positions (and so of offsets) of each question, [question].
    """
    there = np.isfinite(x) & np.isfinite(y).all(axis=1)
    order = np.argsort(~there, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order[:, None], 2)
    lengths = there.sum(axis=1)
    sums = np.zeros(y.shape)
    for length in np.unique(lengths[lengths > 0]).tolist():
        rows = lengths == length
        fx = np.fft.rfft(x[rows, None, :length])
        fy = np.fft.rfft(y[rows, :, :length])
        sums[rows, :, :length] = np.fft.irfft(fx.conj() * fy, n=length)
    return sums, lengths


def circular_draws(
    sums: np.ndarray, lengths: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Every question at a random offset of its own: the totals over questions, and those of the squares.

    Args:
        sums: [question, k, offset], as `circular_products` gives them.
        lengths: [question], how many offsets each has.
        resamples: shuffles.
        seed: of the offsets.

    Returns:
        Both [resample, k].
    """
    n, k, _ = sums.shape
    offsets = (np.random.default_rng(seed).random((resamples, n)) * lengths).astype(int)
    rows = np.arange(n)
    drawn = (sums[:, i][rows, offsets] for i in range(k))
    both = [(d.sum(axis=1), np.square(d).sum(axis=1)) for d in drawn]
    return np.stack([t for t, _ in both], axis=1), np.stack([s for _, s in both], axis=1)


def permutations(n: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Random permutations of n questions: int [resample, n]."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (resamples, 1)), axis=1)


def p_value(draws: np.ndarray, observed: float, sided: int = 2) -> float:
    """(1 + draws at least as far out) / (1 + draws); two-sided around the mean of the draws."""
    if sided == 2:
        draws, observed = np.abs(draws - draws.mean()), abs(observed - draws.mean())
    return float((1 + np.count_nonzero(draws >= observed - SLACK)) / (1 + len(draws)))


def matched(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Matched:
    """The same question's x and y against those of different questions.

    Args:
        x: [question, position]; NaN where there is none. Rank it first for a rank correlation.
        y: [question, position], the same questions.
        resamples: question resamples, and permutations.
        seed: of both.
    """
    table = correlations(x, y)
    table = table[np.isfinite(np.diag(table))][:, np.isfinite(np.diag(table))]
    n, own = len(table), np.diag(table)
    known = np.isfinite(table)
    filled = np.where(known, table, 0)

    def same(weights: np.ndarray) -> np.ndarray:
        return ratio(np.stack([weights @ own, weights.sum(axis=-1)], axis=-1))

    def beyond(weights: np.ndarray) -> np.ndarray:
        return same(weights) - pair_mean(weights, filled, known)

    p = float("nan")
    if n > 1:
        drawn = permutations(n, resamples, seed)
        rows = np.arange(n)
        top, bottom = filled[rows, drawn].sum(axis=1), known[rows, drawn].sum(axis=1)
        draws = ratio(np.stack([top, bottom.astype(float)], axis=-1))
        p = p_value(draws[np.isfinite(draws)], float(own.mean()))
    own_mean = over_questions(n, same, resamples, seed)
    if not n:
        reason = f"no question has {MIN_POSITIONS} positions over which both vary"
        own_mean = Interval(np.nan, np.nan, np.nan, 0, reason=reason)
    other = float(pair_mean(np.ones((1, n)), filled, known)[0])
    return Matched(own_mean, other, over_questions(n, beyond, resamples, seed), np.nan, p)


def association(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Matched:
    """Rank correlation along texts of two quantities of one text, with both nulls.

    Args:
        x: [question, position]; NaN where there is none.
        y: [question, position].
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
    """
    there = np.isfinite(x) & np.isfinite(y)
    there &= there.sum(axis=1, keepdims=True) >= MIN_POSITIONS
    x, y = (ranks(np.where(there, v, np.nan)) for v in (x, y))
    found = matched(x, y, resamples, seed)
    if not found.matched.n_questions:
        return found
    zx, zy = standardised(x), standardised(y)
    use = np.isfinite(zx).any(axis=1) & np.isfinite(zy).any(axis=1)
    sums, lengths = circular_products(zx[use], zy[use][:, None])
    draws, _ = circular_draws(sums / lengths[:, None, None], lengths, resamples, seed)
    return found._replace(p_circular=p_value(draws[:, 0] / use.sum(), found.matched.estimate))
