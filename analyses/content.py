"""Do positions shift because of what is said there, or because of where they are? (claim C9)

Measured along each question's text, questions being the unit: what the position index alone accounts for; and
what goes with how far a position moved, beyond that: entropy and margin of the output there, the class of the
token, and the same question in a second run with reshuffled choices. Each has a null that keeps the position:
other questions at the same positions (`analyses/statistics/matching.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import controls as control_figures
from sst_interp.analyses.overlap import overlap_of, pair_words
from sst_interp.analyses.parts.content_measures import (
    DISTANCE,
    interval_of,
    matched_row,
    quantities,
    second_run,
    share_row,
)
from sst_interp.analyses.parts.positions import READ, readings
from sst_interp.analyses.parts.question_grid import question_grid, shift_threshold
from sst_interp.analyses.parts.token_classes import TokenClass, classes_of, rates_by_class, token_grid
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.along_texts import (
    association,
    class_share,
    matched,
    position_share,
    ranks,
)
from sst_interp.analyses.statistics.bootstrap import LEVEL, RESAMPLES, questions_words
from sst_interp.analyses.statistics.permutation import holm
from sst_interp.choices import COMPARISONS, Choices
from sst_interp.errors import SSTError, unknown_name

POSITION = "position index"
SECOND_RUN = "second run"


@dataclass(frozen=True, eq=False)
class Content(Result):
    """What goes with the size of the change along a text, in one comparison. Intervals resample questions."""

    comparison: str
    kind: str
    """Which overlap."""
    a: int = 1
    b: int = 1
    threshold: float = math.nan
    """Overlap below which a pair counts as shifted."""
    provenance: str = "none"
    """Where the threshold comes from."""
    n_questions: int = 0
    n_positions: int = 0
    """(question, position) pairs."""
    measures: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per measure and quantity. `measure`; `of` (distance or shifted share); `estimate`, `low`, `high`:
    a share of the variance within questions (position index, classes) or a mean rank correlation along the
    text (the others); `by_position`: the same with other questions at the same positions; `beyond`,
    `beyond_low`, `beyond_high`: the estimate less that; `p_circular`, `p_other`: the two nulls; `p_holm`:
    p_other adjusted over the measures of this table; `questions`; `note`: why a number is missing."""
    classes: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Shift rate by token class: role (read or emitted), class, share, low, high, pairs, questions."""
    missing: dict[str, str] = field(default_factory=dict)
    """Measures that are not testable here, and why."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Position or content: {self.words}"

    @property
    def words(self) -> str:
        """The comparison and its pair, in words."""
        return self.comparison if self.not_testable else pair_words(self.comparison, self.a, self.b)

    @property
    def table(self) -> pd.DataFrame:
        """A row per measure and quantity."""
        return self.measures

    def row(self, measure: str, of: str = DISTANCE) -> pd.Series | None:
        """One row of `measures`; None if there is none."""
        if self.measures.empty:
            return None
        here = self.measures[(self.measures["measure"] == measure) & (self.measures["of"] == of)]
        return None if here.empty else here.iloc[0]

    @property
    def content_found(self) -> bool | None:
        """Whether anything but the position goes with the change (`p_holm`); None if that is not testable."""
        tested = self.measures if self.measures.empty else self.measures.dropna(subset=["p_holm"])
        if tested.empty:
            return None
        # n questions have n! orders, so no permutation p-value is below 1 / n!.
        if len(tested) / math.factorial(min(int(tested["questions"].max()), 20)) >= 1 - LEVEL:
            return None
        return bool((tested["p_holm"] < 1 - LEVEL).any())

    @property
    def verdict(self) -> str:
        """What the position accounts for and what goes with content, effect sizes first."""
        if self.not_testable is not None:
            return f"not testable: {self.not_testable}."
        return _verdict(self)

    def figure(self) -> go.Figure:
        """Every measure against what the position alone gives."""
        return self.figures()["measures"]

    def figures(self) -> dict[str, go.Figure]:
        """measures, and classes: shift rate by token class."""
        return control_figures.content(self)


def _verdict(found: Content) -> str:
    words = f"{found.words}: {found.n_positions:,} positions of {questions_words(found.n_questions)}. "
    position = found.row(POSITION)
    if position is not None and math.isfinite(position["estimate"]):
        share = interval_of(position).text()
        words += f"The position index alone accounts for {share} of the variance within questions of "
        words += "how far a position moves; the rest differs from question to question. "
    tied, untied = [], []
    own = found.measures[found.measures["of"] == DISTANCE]
    for row in own[~own["measure"].str.startswith(POSITION)].dropna(subset=["estimate"]).to_dict("records"):
        kind = "share" if row["measure"].startswith("class") else "rank correlation"
        numbers = [f"{kind} {interval_of(row).text()}"]
        numbers += (
            [f"by position alone {row['by_position']:.2g}"] if math.isfinite(row["by_position"]) else []
        )
        numbers += [f"p {row['p_holm']:.2g}"] if math.isfinite(row["p_holm"]) else []
        (tied if row["p_holm"] < 1 - LEVEL else untied).append(f"{row['measure']} ({', '.join(numbers)})")
    words += f"Beyond position it goes with {', '.join(tied)}. " if tied else ""
    none = "No tie beyond position was found to"
    if found.content_found is None:
        none = "Too few questions to tell it from position:"
    words += f"{none} {', '.join(untied)}. " if untied else ""
    words += {
        None: "Whether content matters is not testable here.",
        True: "Which positions move depends on content, not on position alone.",
        False: "No dependence on content beyond position was found.",
    }[found.content_found]
    for reason, names in _by_reason(found.missing).items():
        words += f" Not testable: {', '.join(names)} ({reason})."
    return words


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def content(
    pairs: pd.DataFrame,
    comparison: str,
    steps: pd.DataFrame | None = None,
    token_class: TokenClass | None = None,
    other: pd.DataFrame | None = None,
    questions: pd.DataFrame | None = None,
    other_questions: pd.DataFrame | None = None,
    choices: Choices | None = None,
    threshold: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Content:
    """Whether shifts go with content or with position, in one comparison at the pair (1, deepest).

    Args:
        pairs: the run's `pairs` table.
        comparison: "replayed", "within" or "free".
        steps: the run's `steps` table: entropy, margin and, where they are recorded, tokens.
        token_class: token id -> class name, as a mapping or as a function of an array of ids.
        other: the `pairs` table of a second run of the same questions with reshuffled choices.
        questions: the run's `questions` table and ...
        other_questions: ... the second run's, to pair by record id; questions are paired by index without.
        choices: which overlap, and the threshold; the defaults if None.
        threshold: overlap below which a pair has shifted; None: the one `basin_shifts` would use.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.

    Returns:
        The result; what cannot be tested is in `missing`, with no usable rows the verdict begins "not
        testable:".

    Raises:
        SSTError: if the comparison is unknown, or the chosen overlap was not captured.
    """
    choices = choices or Choices()
    kind = choices.overlap
    if comparison not in COMPARISONS:
        raise unknown_name("comparison", comparison, COMPARISONS)
    overlap_of(pairs.iloc[:0], kind)
    try:
        grid = question_grid(pairs, comparison, kind=kind)
        level, provenance = shift_threshold(pairs, comparison, choices, threshold, resamples, seed)
    except SSTError as error:
        return Content(comparison, kind, not_testable=error.message)
    how = resamples, seed
    moved = quantities(grid, level)
    rows = [share_row(POSITION, of, position_share(x, *how)) for of, x in moved.items()]
    later = grid.positions > 0
    rows += [
        share_row(f"{POSITION}, from 1 on", of, position_share(x[:, later], *how)) for of, x in moved.items()
    ]
    missing: dict[str, str] = {}
    known = readings(steps, comparison, grid.a, grid.b)
    for name in READ:
        values = grid.of_table(known, f"{name}_a")
        if not np.isfinite(values).any():
            missing[name] = "the run has no steps table" if steps is None else "no step goes with these pairs"
            continue
        rows += [matched_row(name, of, association(x, values, *how)) for of, x in moved.items()]
    classes: list[pd.DataFrame] = []
    tokens, reason = token_grid(steps, comparison, grid, token_class)
    for role in ("read", "emitted"):
        measure = f"class of the token {role}"
        if tokens is None or token_class is None:
            missing[measure] = reason
            continue
        codes, names = classes_of(tokens[role], token_class)
        for of, x in moved.items():
            rows.append(share_row(measure, of, class_share(x, codes, len(names), *how)))
        classes.append(rates_by_class(role, codes, names, grid, level, *how))
    again, reason = second_run(grid, other, comparison, level, questions, other_questions)
    for of, x in moved.items():
        if again is None:
            missing[SECOND_RUN] = reason
        else:
            mine, theirs = again[0], again[1][of]
            rows.append(matched_row(SECOND_RUN, of, matched(ranks(x[mine]), ranks(theirs), *how)))
    measures = pd.DataFrame(rows)
    for row in measures[(measures["of"] == DISTANCE) & measures["estimate"].isna()].to_dict("records"):
        missing[row["measure"]] = row["note"]
    measures["p_holm"] = holm(measures["p_other"].to_numpy(dtype=float))
    return Content(
        comparison,
        kind,
        grid.a,
        grid.b,
        level,
        provenance,
        n_questions=len(grid.questions),
        n_positions=int(grid.there.any(axis=-1).sum()),
        measures=measures,
        classes=pd.concat(classes, ignore_index=True) if classes else pd.DataFrame(),
        missing=missing,
    )
