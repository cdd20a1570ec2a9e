"""Which came first, of two things that may happen once at every position of a text.

Time is counted in steps (iterations, or depths), a few per position. Something that has happened by the first
step could not have come earlier: there "before" is impossible. Whatever happens often comes before whatever
happens seldom, so shares of orders mean nothing without the null that the two have nothing to do with each
other: x is shuffled over the positions of its question, 2,000 times. Shuffling fixes how often x and y happen
at each step in each question, so only their table is drawn, and its cost does not grow with the positions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.bootstrap import RESAMPLES, bootstrap_ends, ratio

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


def shuffled(counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
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
    drawn = orders(shuffled(counts, resamples, seed)).astype(float)
    nothing = np.full(len(ORDERS), np.nan)
    null, ends, p = nothing, (nothing, nothing), nothing
    if len(seen):
        drawn /= drawn.sum(axis=1, keepdims=True)  # how often y happens is the same in every shuffle
        null, ends = drawn.mean(axis=0), np.quantile(drawn, [0.025, 0.975], axis=0)
        up, down = ((side * (drawn - share) >= -1e-12).sum(axis=0) for side in (1, -1))
        p = np.minimum(2 * (1 + np.minimum(up, down)) / (1 + resamples), 1)
    return pd.DataFrame({**columns, "null": null, "null_low": ends[0], "null_high": ends[1], "p": p})
