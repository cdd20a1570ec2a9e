"""Shifts per question: are there some in every question, or is the rate of the run that of a few?

A shifted share of 14% may be 14% of every question, or all of every seventh. Per question: the share of its
(position, layer) pairs that shifted, and at how many positions any layer did. `top_tenth` is the share of all
shifts that lie in the tenth of the questions that shift most; 10% if questions have equally many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN, BasinShifts
from sst_interp.analyses.figures import shifts as shift_figures
from sst_interp.analyses.parts.question_grid import question_grid, share_of_questions
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, cluster_bootstrap, questions_words


@dataclass(frozen=True, eq=False)
class ShiftsPerQuestion(Result):
    """How shifts are spread over the questions of one comparison and one pair of depths."""

    comparison: str
    words: str
    """What was compared, in words."""
    threshold: float
    """Overlap below which a pair counts as shifted."""
    n_questions: int
    median: Interval = UNKNOWN
    """Median over questions of the shifted share of a question's pairs."""
    without: Interval = UNKNOWN
    """Share of questions in which nothing shifts."""
    top_tenth: Interval = UNKNOWN
    """Share of all shifts that lie in the tenth of the questions with the most."""
    per_question: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns question, pairs, shifted, share, positions, positions_shifted (a shift in any layer)."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Shifts per question: {self.words}"

    @property
    def table(self) -> pd.DataFrame:
        """Quantiles over questions of the shifted share of pairs and of positions."""
        at = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
        if self.per_question.empty:
            return pd.DataFrame({"quantile": [], "share of pairs": [], "share of positions": []})
        positions = self.per_question["positions_shifted"] / self.per_question["positions"]
        return pd.DataFrame(
            {
                "quantile": at,
                "share of pairs": np.quantile(self.per_question["share"], at),
                "share of positions": np.quantile(positions, at),
            }
        )

    @property
    def verdict(self) -> str:
        """Median question, questions without, concentration."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        n = questions_words(self.n_questions)
        if not self.per_question["shifted"].any():
            return f"{self.words}: none of {n} has a shift below {self.threshold:.4g}."
        words = f"{self.words}: the median question shifts in {self.median.text(percent=True)} of its pairs; "
        words += f"{self.without.text(percent=True)} of {n} never shift"
        return words + f"; the tenth with the most has {self.top_tenth.text(percent=True)} of all shifts."

    def figure(self) -> go.Figure:
        """Questions from least to most shifted."""
        return shift_figures.per_question(self)


def shifts_per_question(
    pairs: pd.DataFrame, found: BasinShifts, resamples: int = RESAMPLES, seed: int = 0
) -> ShiftsPerQuestion:
    """How shifts are spread over questions, for the comparison, pair and threshold of `found`.

    Args:
        pairs: the run's `pairs` table.
        found: from `basin_shifts` on the same table.
        resamples: question resamples.
        seed: of the resampling.
    """
    if found.not_testable:
        return ShiftsPerQuestion(found.comparison, found.words, math.nan, 0, not_testable=found.not_testable)
    grid = question_grid(pairs, found.comparison, found.a, found.b, found.kind)
    shifted, there = grid.shifted(found.threshold), grid.there
    table = pd.DataFrame(
        {
            "question": grid.questions,
            "pairs": there.sum(axis=(1, 2)),
            "shifted": shifted.sum(axis=(1, 2)),
            "share": shifted.sum(axis=(1, 2)) / there.sum(axis=(1, 2)),
            "positions": there.any(axis=2).sum(axis=1),
            "positions_shifted": shifted.any(axis=2).sum(axis=1),
        }
    )
    shares, shifts = np.sort(table["share"].to_numpy()), np.sort(table["shifted"].to_numpy())

    def median(drawn: np.ndarray) -> np.ndarray:
        cumulative = np.cumsum(drawn, axis=1)
        half = len(shares) / 2
        low, high = (cumulative < half).sum(axis=1), (cumulative <= half).sum(axis=1)
        return (shares[low] + shares[np.minimum(high, len(shares) - 1)]) / 2

    def top(drawn: np.ndarray) -> np.ndarray:
        # How often each is drawn, from the most shifts down, until a tenth of the questions is full.
        drawn, most = drawn[:, ::-1], shifts[::-1]
        room = len(shifts) / 10 - (np.cumsum(drawn, axis=1) - drawn)
        total = drawn @ most
        return np.divide(
            np.clip(room, 0, drawn) @ most, total, out=np.full(len(drawn), np.nan), where=total > 0
        )

    # A row of the identity says which question was drawn; questions stand in order of their shifts.
    each = np.eye(len(table))
    return ShiftsPerQuestion(
        comparison=found.comparison,
        words=found.words,
        threshold=found.threshold,
        n_questions=len(table),
        median=cluster_bootstrap(each, median, resamples, seed=seed),
        without=share_of_questions(shifts == 0, resamples, seed),
        top_tenth=cluster_bootstrap(each, top, resamples, seed=seed),
        per_question=table,
    )
