"""Do questions share a pattern over layers at position 0, and is it one that other positions have too?

Overlaps differ by layer in much the same way everywhere, so the profiles of any two questions correlate. The
question is what is left at a position once each question's usual profile is taken off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sst_interp.analyses.parts.question_grid import Grid
from sst_interp.analyses.statistics.along_texts import likeness, over_questions, pair_mean
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval

UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, reason="not testable")


@dataclass(frozen=True, eq=False)
class Alike:
    """Mean rank correlations over layers between different questions at one position, by log(1 - overlap)."""

    zero: Interval = UNKNOWN
    """Of the profiles at position 0."""
    later: Interval = UNKNOWN
    """Of the profiles at the same later position."""
    own_zero: Interval = UNKNOWN
    """As `zero`, with each question's mean profile over its later positions taken off."""
    own_later: Interval = UNKNOWN
    """As `later`, with the same taken off."""
    difference: Interval = UNKNOWN
    """own_zero - own_later: above 0, position 0 has a pattern of its own that questions share."""


def alike(grid: Grid, resamples: int = RESAMPLES, seed: int = 0) -> Alike:
    """How alike questions are at position 0 and at later positions; intervals resample questions."""
    v, zero, later = grid.distance(), grid.positions == 0, grid.positions > 0
    there = np.isfinite(v[:, later])
    counts = there.sum(axis=1)
    usual = np.where(there, v[:, later], 0).sum(axis=1) / np.where(counts, counts, np.nan)
    parts = [likeness(v[:, where]) for where in (zero, later)]
    v -= usual[:, None]
    parts += [likeness(v[:, where]) for where in (zero, later)]

    def one(i: int) -> Interval:
        return over_questions(len(v), lambda w: pair_mean(w, *parts[i]), resamples, seed)

    def difference(weights: np.ndarray) -> np.ndarray:
        return pair_mean(weights, *parts[2]) - pair_mean(weights, *parts[3])

    found = [one(i) for i in range(4)]
    return Alike(*found, difference=over_questions(len(v), difference, resamples, seed))
