"""The measures of `analyses/content.py` as rows of one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.analyses.parts.question_grid import Grid, question_grid, same_questions
from sst_interp.analyses.statistics.along_texts import LabelShare, Matched
from sst_interp.analyses.statistics.bootstrap import Interval
from sst_interp.errors import SSTError

DISTANCE, SHIFTED = "distance", "shifted share"
"""What is asked about: mean over layers of log(1 - overlap), and share of the layers that shifted."""


def quantities(grid: Grid, threshold: float) -> dict[str, np.ndarray]:
    """Both, [question, position]; NaN where there are no pairs."""
    return {DISTANCE: grid.mean_distance(), SHIFTED: grid.shifted_share(threshold)}


def share_row(measure: str, of: str, found: LabelShare) -> dict[str, object]:
    """A share of the variance as a row."""
    beyond = found.share.estimate - found.by_position
    return _row(measure, of, found.share, found.by_position, found.p_circular, found.p_other) | {
        "beyond": beyond
    }


def matched_row(measure: str, of: str, found: Matched) -> dict[str, object]:
    """A correlation along texts as a row."""
    row = _row(measure, of, found.matched, found.mismatched, found.p_circular, found.p_other)
    return row | {
        "beyond": found.beyond.estimate,
        "beyond_low": found.beyond.low,
        "beyond_high": found.beyond.high,
    }


def _row(
    measure: str, of: str, share: Interval, by_position: float, p_circular: float, p_other: float
) -> dict[str, object]:
    return {
        "measure": measure,
        "of": of,
        "estimate": share.estimate,
        "low": share.low,
        "high": share.high,
        "by_position": by_position,
        "beyond": math.nan,
        "beyond_low": math.nan,
        "beyond_high": math.nan,
        "p_circular": p_circular,
        "p_other": p_other,
        "questions": share.n_questions,
        "note": share.reason,
    }


def interval_of(row: Mapping[Any, Any] | pd.Series) -> Interval:
    """The interval that a row was made of."""
    return Interval(row["estimate"], row["low"], row["high"], int(row["questions"]), reason=row["note"])


def second_run(
    grid: Grid,
    other: pd.DataFrame | None,
    comparison: str,
    threshold: float,
    questions: pd.DataFrame | None,
    other_questions: pd.DataFrame | None,
) -> tuple[tuple[np.ndarray, dict[str, np.ndarray]] | None, str]:
    """Rows of this run and both quantities of the second, at the positions of this one; or why not."""
    if other is None:
        return None, "no second run was given"
    try:
        second = question_grid(other, comparison, grid.a, grid.b, grid.kind)
    except SSTError as error:
        return None, f"in the second run, {error.message}"
    mine, theirs = same_questions(grid, second, questions, other_questions)
    if not len(mine):
        return None, "the two runs have no question in common"
    at = pd.Index(second.positions).get_indexer(pd.Index(grid.positions))
    found = quantities(second, threshold)
    return (mine, {of: np.where(at >= 0, x[theirs][:, at], np.nan) for of, x in found.items()}), ""
