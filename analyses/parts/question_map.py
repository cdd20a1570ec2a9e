"""One question's overlaps by position and layer: where it shifts."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from sst_interp.analyses.overlap import overlap_of, select
from sst_interp.errors import SSTError


class QuestionMap(NamedTuple):
    """One question: positions down, layers across; NaN where there is no pair."""

    overlap: pd.DataFrame
    norm_ratio: pd.DataFrame
    """norm_b / norm_a."""


def question_map(
    pairs: pd.DataFrame,
    question: int,
    comparison: str,
    a: int | None = None,
    b: int | None = None,
    kind: str = "cosine",
) -> QuestionMap:
    """Where one question shifts: overlap and norm ratio by position and layer (default: deepest pair).

    Raises:
        SSTError: if the question has no such pairs.
    """
    rows, a, b = select(pairs, comparison, a, b)
    rows = rows[(rows["question"] == question).to_numpy(dtype=bool)]
    if rows.empty:
        raise SSTError(
            f"question {question} has no pairs of comparison {comparison!r} between {a} and {b}",
            "questions are numbered from 0 in the run's questions table",
        )
    values = rows.assign(
        overlap=overlap_of(rows, kind), norm_ratio=(rows["norm_b"] / rows["norm_a"]).astype(float)
    )
    return QuestionMap(
        *(values.pivot(index="position", columns="layer", values=v) for v in ("overlap", "norm_ratio"))
    )
