"""A number over seeds: trainings are few, and each is a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from sst_interp.analyses.statistics.bootstrap import LEVEL


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
