"""How do quantities at the positions of a text go together? Questions are the unit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    Statistic,
    cluster_bootstrap,
    nothing,
    ratio,
)


def pair_mean(weights: np.ndarray, products: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over pairs of different questions: weights [resample, question] -> [resample].

    Args:
        weights: how often each question was drawn.
        products: [question, question], a sum over what the two have in common; its diagonal is not read.
        counts: [question, question], the number of things summed.
    """
    top, bottom = (m - np.diag(np.diag(m)) for m in (products, counts.astype(float)))
    return ratio(np.stack([((weights @ m) * weights).sum(axis=-1) for m in (top, bottom)], axis=-1))


def over_questions(n: int, statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """`cluster_bootstrap` of a statistic of the weights: [resample, question] -> [resample]."""
    return cluster_bootstrap(np.eye(n), statistic, resamples, seed=seed)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1, ties sharing their mean rank; NaN keeps its place and has none."""
    return rankdata(values, axis=-1, nan_policy="omit")


def standardised(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 along the last axis, over what is there; all NaN where nothing varies."""
    there = np.isfinite(values)
    n = np.maximum(there.sum(axis=-1, keepdims=True), 1)
    gap = np.where(there, values, 0) - np.where(there, values, 0).sum(axis=-1, keepdims=True) / n
    gap = np.where(there, gap, 0)
    spread = np.sqrt((gap**2).sum(axis=-1, keepdims=True) / n)
    scale = np.abs(np.where(there, values, 0)).max(axis=-1, keepdims=True, initial=0)
    varies = spread > 1e-12 * scale
    return np.where(there & varies, gap / np.where(varies, spread, 1), np.nan)


def likeness(profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlations of different questions' profiles, summed over the positions both have.

    Args:
        profiles: [question, position, layer]; a profile with a NaN, or in which nothing varies, is left out.

    Returns:
        products and counts for `pair_mean`, both [question, question].
    """
    n, _, k = profiles.shape
    whole = np.isfinite(profiles).all(axis=-1, keepdims=True)
    z = standardised(ranks(np.where(whole, profiles, np.nan))) / np.sqrt(max(k, 1))
    there = np.isfinite(z).all(axis=-1)
    z = np.where(there[..., None], z, 0).reshape(n, -1)
    return z @ z.T, there.astype(float) @ there.T.astype(float)


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
        return np.where(flat | (n < MIN_POSITIONS), np.nan, top / np.sqrt(vx * vy))


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
        own_mean = nothing(f"no question has {MIN_POSITIONS} positions over which both vary")
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
    tie = matched(x, y, resamples, seed)
    if not tie.matched.n_questions:
        return tie
    zx, zy = standardised(x), standardised(y)
    use = np.isfinite(zx).any(axis=1) & np.isfinite(zy).any(axis=1)
    sums, lengths = circular_products(zx[use], zy[use][:, None])
    draws, _ = circular_draws(sums / lengths[:, None, None], lengths, resamples, seed)
    return tie._replace(p_circular=p_value(draws[:, 0] / use.sum(), tie.matched.estimate))


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
    """Each row minus its own mean: [question, position]; NaN stays, and a row with fewer than 2 is all
    NaN.
    """
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
    use = np.isfinite(y).any(axis=1)
    y = y[use]
    if not len(y) or not varies(y, values[use]):
        return LabelShare(_nothing(len(y)), np.nan, np.nan, np.nan)
    there = np.isfinite(y)
    sums, counts = np.where(there, y, 0), there.astype(float)
    share = _share(y, sums, counts, resamples, seed)
    if len(y) < 2:
        return LabelShare(share, np.nan, np.nan, np.nan)
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
    return LabelShare(share, np.nan, p_value(draws, share.estimate, sided=1), np.nan)


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
    share = _share(y, sums, counts, resamples, seed)
    if n < 2:
        return LabelShare(share, np.nan, np.nan, np.nan)
    square = (filled**2).sum(), there.sum()
    products, lengths = circular_products(y, np.where(there[:, None], labels, np.nan))
    totals, squares = circular_draws(products, lengths, resamples, seed)
    variance = np.full(resamples, square[0] / square[1])
    draws = explained(totals, squares, counts.sum(axis=0), (counts**2).sum(axis=0), variance)
    swapped = _other_questions(filled, there, labels, resamples, seed)
    return LabelShare(
        share, float(swapped.mean()), p_value(draws, share.estimate, 1), p_value(swapped, share.estimate, 1)
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
    return nothing("nothing varies" if n else "no question has two positions", n)
