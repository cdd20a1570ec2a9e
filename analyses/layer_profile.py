"""Layer profile: which layers shift, with a band that holds for all of them at once.

The eye compares the layers of a profile with each other, so an interval for each layer alone is too narrow:
with 30 layers some stray. The band is for the whole profile (`simultaneous_shares`). Whether the profile is
flat is tested on questions: does a layer's rate differ from the mean rate of all layers *of the same
question*? Signs of those differences are flipped by question, and the largest over layers gives the p-values,
so layers may be as correlated as they like (`permutation.sign_flip`). Which layers shift is not by itself a
finding about basins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN, BasinShifts
from sst_interp.analyses.figures import shifts as shift_figures
from sst_interp.analyses.parts.question_grid import question_grid
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, percent_text, questions_words, ratio
from sst_interp.analyses.statistics.permutation import sign_flip


@dataclass(frozen=True, eq=False)
class LayerProfile(Result):
    """Shift rate per layer of one comparison and one pair of depths."""

    comparison: str
    words: str
    """What was compared, in words."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    n_questions: int
    share: Interval = UNKNOWN
    """Shifted share of all pairs: the mean of the profile."""
    profile: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The columns of `BasinShifts.by_layer`: layer, share, low, high (each layer alone), band_low, band_high
    (all at once) and so on; then off (a layer's rate minus the question's mean rate over layers, mean over
    questions), p, p_layers (of `off`: alone, and for all layers at once). A layer in which no question
    shifted has a band of no width, as any bootstrap of zeros."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Shift rate by layer: {self.words}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer."""
        return self.profile

    @property
    def layers_off(self) -> int:
        """Layers whose rate differs from the mean of all layers, tested together at 0.05."""
        return int((self.profile["p_layers"] < 0.05).sum()) if len(self.profile) else 0

    @property
    def verdict(self) -> str:
        """Highest and lowest layer with the band, and whether the profile is flat."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        rates = self.profile["share"].to_numpy()
        ends = [self.profile.iloc[i] for i in (int(rates.argmax()), int(rates.argmin()))]
        n = questions_words(self.n_questions)
        if rates.max() == 0:
            return f"{self.words}: no layer shifts below {self.threshold:.4g}; {n}."
        words = [f"layer {row['layer']:.0f} ({_banded(row)})" for row in ends]
        said = f"{self.words}: {words[0]} shifts most and {words[1]} least of {len(rates)} layers; "
        if self.profile["p_layers"].isna().all():
            return said + f"whether the profile is flat is not tested; {n}."
        said += f"{self.layers_off} differ from the mean of all layers (sign flips, all layers at once)"
        return said + f"; {n}."

    def figure(self) -> go.Figure:
        """The profile with its band."""
        return shift_figures.layer_profile(self)


def _banded(row: pd.Series) -> str:
    if not math.isfinite(row["band_low"]):
        return percent_text(row["share"])
    ends = (percent_text(float(row[c])) for c in ("band_low", "band_high"))
    return f"{percent_text(float(row['share']))} [{', '.join(ends)}]"


def layer_profile(
    pairs: pd.DataFrame, found: BasinShifts, resamples: int = RESAMPLES, seed: int = 0
) -> LayerProfile:
    """The profile for the comparison, pair and threshold of `found`.

    Args:
        pairs: the run's `pairs` table.
        found: from `basin_shifts` on the same table.
        resamples: sign flips.
        seed: of the flips.
    """
    if found.not_testable:
        return LayerProfile(found.comparison, found.words, math.nan, 0, not_testable=found.not_testable)
    grid = question_grid(pairs, found.comparison, found.a, found.b, found.kind)
    rates = ratio(np.stack([grid.shifted(found.threshold).sum(axis=1), grid.there.sum(axis=1)], axis=-1))
    off = rates - np.nanmean(rates, axis=1, keepdims=True)
    if off.shape[1] == 1:  # one layer is its own mean
        off = np.full_like(off, np.nan)
    test = sign_flip(off, resamples, seed)
    return LayerProfile(
        comparison=found.comparison,
        words=found.words,
        threshold=found.threshold,
        n_questions=len(grid.questions),
        share=found.share,
        profile=found.by_layer.assign(off=test.estimate, p=test.p_value, p_layers=test.p_family),
    )
