"""Hartigan's dip test of one mode, on questions instead of pairs (optional: `pip install diptest`).

The dip is the largest distance between a distribution function and the nearest one with one mode (Hartigan &
Hartigan 1985): 0 to 1/4, about half the share of the smaller mode at most. Its table of p-values is for
independent observations, and pairs of one question are not. So there are two p-values:

- `p_value`, by the table, for subsamples of one pair from every question: independent if questions are. Twice
  the median over subsamples is a valid p-value, whatever their dependence (Rueger 1978). It has little power
  with few questions or a small second mode; a large one is no evidence of one mode.
- `p_questions`, for all pairs: how often question sampling makes a dip as large out of the nearest one-moded
  density (as in `modes`: that density plus the deviations of the question bootstrap). In simulations of 8 to
  100 questions with one mode and noise shared within positions it was below 0.05 in 7% to 8% of the runs.

The distribution is the one `modes` looks at: overlaps per unit of overlap, smeared in
v = log(1 - overlap + r) by the same kernel, so that rounding and the steps of a Jaccard index are not dips.
Every question has the same weight. The `diptest` package is under the GPL and is never required.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sst_interp.analyses.statistics.bootstrap import LEVEL, Interval, resampled
from sst_interp.analyses.statistics.modes import (
    BANDWIDTH,
    BINS,
    MIN_QUESTIONS,
    grid,
    one_moded,
    smoothing,
    to_overlap,
)

SUBSAMPLES = 101
"""Subsamples of one pair per question."""
DIP_RESAMPLES = 200
"""Question resamples of the dip."""
POINTS = 250
"""Quantiles at which the dip of a whole distribution is taken; it is exact to 1 / POINTS."""
NOT_INSTALLED = "not installed: pip install diptest"


@dataclass(frozen=True)
class DipTest:
    """How far a distribution is from having one mode, and whether that could be chance."""

    dip: Interval
    """The dip of the whole distribution; resampling questions makes it larger on average, as a distance."""
    p_value: float
    """Chance of such dips with one mode, from one pair per question; NaN if not tested."""
    p_questions: float
    """The same from all pairs, against question sampling of the nearest one-moded density."""
    reason: str | None = None
    """Why it was not tested; None if it was."""


def dip_test(histograms: np.ndarray, resolution: float, seed: int = 0) -> DipTest:
    """Test one distribution for one mode.

    Args:
        histograms: [question, BINS] on `modes.grid(resolution)`.
        resolution: r.
        seed: of the subsamples and resamples.
    """
    histograms = histograms[histograms.sum(axis=1) > 0]
    n = len(histograms)
    try:
        package = importlib.import_module("diptest")
    except ImportError:
        return _untested(NOT_INSTALLED, n)
    if n < MIN_QUESTIONS:
        return _untested(f"too few questions ({n}, at least {MIN_QUESTIONS} are needed)", n)
    equal = histograms / histograms.sum(axis=1, keepdims=True)
    subsamples = np.sort(one_per_question(equal, resolution, seed), axis=1)
    # The p-value falls with the dip: the median of one is the median of the other.
    middle = np.argsort([package.dipstat(each, sort_x=False) for each in subsamples])[SUBSAMPLES // 2]
    p_value = float(package.diptest(subsamples[middle])[1])
    masses = equal @ smoothing(resolution) / n
    mass, width = masses.sum(axis=0), np.diff(np.exp(grid(resolution)))
    resamples = resampled(masses, DIP_RESAMPLES, seed)
    null = np.maximum(one_moded(mass / width, width) * width + resamples - mass, 0)
    whole = float(_dips(package.dipstat, mass[None], resolution)[0])
    drawn, by_chance = (_dips(package.dipstat, each, resolution) for each in (resamples, null))
    exceeded = np.count_nonzero(by_chance >= whole - 1e-9)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    dip = Interval(whole, min(float(low), whole), max(float(high), whole), n)
    p_questions = (1 + exceeded) / (1 + DIP_RESAMPLES)
    return DipTest(dip, min(1.0, 2 * p_value), p_questions)


def one_per_question(equal: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """One overlap from every question, many times: shares [question, BINS] -> [subsample, question]."""
    rng = np.random.default_rng(seed)
    n = len(equal)
    # Each question's distribution function, one above the other: a search finds the bin in all of them.
    rising = (np.cumsum(equal, axis=1) / equal.sum(axis=1, keepdims=True) + np.arange(n)[:, None]).ravel()
    drawn = rng.random((SUBSAMPLES, n)) + np.arange(n)
    index = np.searchsorted(rising, drawn, side="right") - BINS * np.arange(n)
    edges = grid(resolution)
    step = edges[1] - edges[0]
    v = edges[np.clip(index, 0, BINS - 1)] + step * rng.random(index.shape)
    v = v + BANDWIDTH * rng.normal(size=v.shape)
    v = edges[0] + np.abs(v - edges[0])  # reflected at both ends, as the kernel is
    v = edges[-1] - np.abs(edges[-1] - v)
    return to_overlap(v, resolution)


def _dips(dipstat: Callable[..., float], masses: np.ndarray, resolution: float) -> np.ndarray:
    """The dip of each histogram [..., BINS], through its quantiles."""
    rising = np.pad(np.cumsum(masses, axis=-1), ((0, 0), (1, 0)))
    wanted, edges = (np.arange(POINTS) + 0.5) / POINTS, grid(resolution)
    v = np.stack([np.interp(wanted * each[-1], each, edges) for each in rising])
    overlap = np.ascontiguousarray(to_overlap(v, resolution)[:, ::-1])  # ascending
    return np.array([dipstat(each, sort_x=False) for each in overlap])


def _untested(reason: str, n: int) -> DipTest:
    return DipTest(Interval(math.nan, math.nan, math.nan, n, reason=reason), math.nan, math.nan, reason)
