"""How alike are profiles of different questions?

A profile is what one question has along an axis: its overlaps over layers, its distance over positions. Means
over *pairs of different questions* are unbiased: where profiles have nothing in common they are 0 on average,
however few questions there are. A resample can draw a question twice; that question is never paired with
itself. Cost is linear in the cells, for a given number of questions.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from sst_interp.analyses.statistics.resampling import RESAMPLES, Interval, Statistic, cluster_bootstrap, ratio


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
    """`cluster_bootstrap` of a statistic of the weights themselves: [resample, question] -> [resample]."""
    return cluster_bootstrap(np.eye(n), statistic, resamples, seed=seed)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1, ties sharing their mean rank; NaN keeps its place and has none."""
    there = np.isfinite(values)
    found = rankdata(np.where(there, values, np.inf), axis=-1)
    return np.where(there, found, np.nan)


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
