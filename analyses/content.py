"""Do positions shift because of what is said there, or because of where they are? (claim C9)

What goes with how far a position moved: the position index alone; and beyond that entropy and margin of the
output there, the class of the token, and the same question in a second run with reshuffled choices. Questions
are the unit, and the null keeps the position: other questions at the same positions
(`statistics.along_texts`). At a generated position one token is read (the one before it) and one is emitted;
position 0 reads the last token of the prompt, which a run does not record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import READ, Contrast, Grid, same_questions
from sst_interp.analyses.plots import Dot, dots, empty_figure
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.along_texts import (
    LabelShare,
    Matched,
    association,
    class_share,
    matched,
    position_share,
    ranks,
)
from sst_interp.analyses.statistics.bootstrap import LEVEL, Interval, by, questions_words
from sst_interp.analyses.statistics.permutation import holm
from sst_interp.errors import SSTError

POSITION = "position index"
SECOND_RUN = "second run"
DISTANCE, SHIFTED = "distance", "shifted share"
"""What is asked about: mean over layers of log(1 - overlap), and share of the layers that shifted."""


@dataclass(frozen=True, eq=False)
class Content(Shifts):
    """What the size of the change along a text goes with. Intervals resample questions."""

    named = "Position or content"
    shown = "measures"
    provenance: str
    """Where the threshold comes from."""
    n_positions: int
    """(question, position) pairs."""
    measures: pd.DataFrame
    """A row per measure and quantity. `measure`; `of` (distance or shifted share); `estimate`, `low`, `high`:
    a share of the variance within questions (position index, classes) or a mean rank correlation along the
    text (the others); `by_position`: the same with other questions at the same positions; `beyond`,
    `beyond_low`, `beyond_high`: the estimate less that; `p_circular`, `p_other`: the two nulls; `p_holm`:
    p_other adjusted over the measures of this table; `questions`; `note`: why a number is missing."""
    classes: pd.DataFrame
    """Shift rate by token class: role (read or emitted), class, share, low, high, pairs, questions."""
    missing: dict[str, str]
    """Measures that are not testable here, and why."""

    def row(self, measure: str, of: str = DISTANCE) -> pd.Series | None:
        """One row of `measures`; None if there is none."""
        here = self.measures[(self.measures["measure"] == measure) & (self.measures["of"] == of)]
        return None if here.empty else here.iloc[0]

    @property
    def content_found(self) -> bool | None:
        """Whether anything but the position goes with the change (`p_holm`); None if that is not testable."""
        tested = self.measures.dropna(subset=["p_holm"])
        if tested.empty:
            return None
        # n questions have n! orders, so no permutation p-value is below 1 / n!.
        if len(tested) / math.factorial(min(int(tested["questions"].max()), 20)) >= 1 - LEVEL:
            return None
        return bool((tested["p_holm"] < 1 - LEVEL).any())

    @property
    def verdict(self) -> str:
        """Whether content matters, the strongest tie, and what the position accounts for."""
        words = {
            None: "Whether content matters is not testable here",
            True: "Which positions move depends on content, not on position alone",
            False: "No dependence on content beyond position is seen",
        }[self.content_found]
        words += f". {self.words.capitalize()}: "
        own = self.measures[self.measures["of"] == DISTANCE]
        ties = own[~own["measure"].str.startswith(POSITION)].dropna(subset=["estimate"])
        for row in ties.sort_values("p_holm", kind="stable").head(1).to_dict("records"):
            kind = "share of the variance" if row["measure"].startswith("class") else "rank correlation"
            words += f"the clearest tie is to {row['measure']} ({kind} {interval_of(row).text()}"
            for name, value in (("by position alone", "by_position"), ("adjusted p", "p_holm")):
                words += f", {name} {row[value]:.2g}" if math.isfinite(row[value]) else ""
            words += "); "
        position = self.row(POSITION)
        if position is not None and math.isfinite(position["estimate"]):
            words += f"the position index alone accounts for {interval_of(position).text(percent=True)} of "
            words += "the variance within questions; "
        words += f"{self.n_positions:,} positions of {questions_words(self.n_questions)}."
        for reason in dict.fromkeys(self.missing.values()):
            names = [name for name, why in self.missing.items() if why == reason]
            words += f" Not testable: {', '.join(names)} ({reason})."
        return words

    def figure(self) -> go.Figure:
        """Every measure beside what the position alone gives."""
        rows, alone = [], []
        for r in self.measures.dropna(subset=["estimate"]).to_dict("records"):
            label = f"{r['measure']}<br>{r['of']}"
            rows.append(Dot(label, "same question", r["estimate"], r["low"], r["high"]))
            if np.isfinite(r["by_position"]):
                alone.append(Dot(label, "other questions, same positions", r["by_position"], np.nan, np.nan))
        axis = "share of variance (position, classes), mean rank correlation (others)"
        return dots("Position or content", self.subtitle, axis, [*rows, *alone], reference=0)

    def figures(self) -> dict[str, go.Figure]:
        """measures, and classes: shift rate by token class."""
        title = "Shift rate by token class"
        if self.classes.empty:
            reason = next((r for m, r in self.missing.items() if m.startswith("class")), "no tokens")
            return {"measures": self.figure(), "classes": empty_figure(title, f"not testable: {reason}")}
        each = [
            Dot(r["class"], f"token {r['role']}", r["share"], r["low"], r["high"])
            for r in self.classes.to_dict("records")
        ]
        classes = dots(title, self.subtitle, "shifted share of pairs", each)
        classes.update_xaxes(tickformat=".0%", rangemode="tozero")
        return {"measures": self.figure(), "classes": classes}


def interval_of(row: Mapping[Any, Any] | pd.Series) -> Interval:
    """The interval of a row of `Content.measures`."""
    return Interval(row["estimate"], row["low"], row["high"], int(row["questions"]), reason=row["note"])


@analysis("Position or content", "Does what is being said decide what shifts?", claims=("C9",), order=100)
def content(c: Contrast) -> Content:
    """Whether shifts go with content or with position, at the pair that is compared.

    `c.token_class` names the classes of tokens; the run that stands beside it as `reshuffled` is the second
    run. What cannot be tested is in `missing`.

    Raises:
        Untestable: if no pair has an overlap.
    """
    grid, how = c.grid, c.resampling
    moved = quantities(grid, c.threshold)
    rows = [share_row(POSITION, of, position_share(x, *how)) for of, x in moved.items()]
    later = grid.positions > 0
    rows += [
        share_row(f"{POSITION}, from 1 on", of, position_share(x[:, later], *how)) for of, x in moved.items()
    ]
    missing: dict[str, str] = {}
    steps = c.tables.get("steps")
    for name in READ:
        values = grid.of_table(c.readings, f"{name}_a")
        if not np.isfinite(values).any():
            missing[name] = "the run has no steps table" if steps is None else "no step goes with these pairs"
            continue
        rows += [matched_row(name, of, association(x, values, *how)) for of, x in moved.items()]
    classes: list[pd.DataFrame] = []
    tokens, reason = tokens_of(c)
    for role in ("read", "emitted"):
        measure = f"class of the token {role}"
        if tokens is None or c.token_class is None:
            missing[measure] = reason
            continue
        codes, names = classes_of(tokens[role], c.token_class)
        for of, x in moved.items():
            rows.append(share_row(measure, of, class_share(x, codes, len(names), *how)))
        classes.append(_rates_by_class(role, codes, names, c))
    again, reason = second_run(c, c.threshold)
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
        **c.judged,
        provenance=c.division.provenance,
        n_questions=len(grid.questions),
        n_positions=int(grid.there.any(axis=-1).sum()),
        measures=measures,
        classes=pd.concat(classes, ignore_index=True) if classes else pd.DataFrame(),
        missing=missing,
    )


def quantities(grid: Grid, threshold: float) -> dict[str, np.ndarray]:
    """Distance and shifted share, [question, position]; NaN where there are no pairs."""
    return {DISTANCE: grid.mean_distance(), SHIFTED: grid.shifted_share(threshold)}


def share_row(measure: str, of: str, label: LabelShare) -> dict[str, object]:
    """A share of the variance as a row."""
    row = _row(measure, of, label.share, label.by_position, label.p_circular, label.p_other)
    return row | {"beyond": label.share.estimate - label.by_position}


def matched_row(measure: str, of: str, tie: Matched) -> dict[str, object]:
    """A correlation along texts as a row."""
    row = _row(measure, of, tie.matched, tie.mismatched, tie.p_circular, tie.p_other)
    beyond = tie.beyond
    return row | {"beyond": beyond.estimate, "beyond_low": beyond.low, "beyond_high": beyond.high}


def _row(
    measure: str, of: str, share: Interval, by_position: float, p_circular: float, p_other: float
) -> dict[str, object]:
    row: dict[str, object] = {
        "measure": measure,
        "of": of,
        "estimate": share.estimate,
        "low": share.low,
        "high": share.high,
    }
    row |= {"by_position": by_position, "beyond": math.nan, "beyond_low": math.nan, "beyond_high": math.nan}
    row |= {"p_circular": p_circular, "p_other": p_other}
    return row | {"questions": share.n_questions, "note": share.reason}


def second_run(c: Contrast, threshold: float) -> tuple[tuple[np.ndarray, dict[str, np.ndarray]] | None, str]:
    """Rows of this run and both quantities of the second, at the positions of this one; or why not."""
    other, grid = c.of_companion("reshuffled"), c.grid
    if other is None:
        return None, "no second run was given"
    try:
        second = other.at(c.a, c.b).grid
    except SSTError as error:
        return None, f"in the second run, {error.message}"
    mine, theirs = same_questions(grid, second, c.tables.get("questions"), other.tables.get("questions"))
    if not len(mine):
        return None, "the two runs have no question in common"
    at = pd.Index(second.positions).get_indexer(pd.Index(grid.positions))
    both = quantities(second, threshold)
    return (mine, {of: np.where(at >= 0, x[theirs][:, at], np.nan) for of, x in both.items()}), ""


def tokens_of(c: Contrast) -> tuple[dict[str, np.ndarray] | None, str]:
    """Ids of the tokens `read` and `emitted` at each position, [question, position], NaN where unknown.

    Returns:
        None and the reason if the run stores none.
    """
    steps = c.tables.get("steps")
    if steps is None or "token" not in steps:
        return None, "the run has no steps table"
    if steps["token"].isna().all():
        return None, "the run stores no tokens"
    if c.token_class is None:
        return None, "no token classes were given"
    text, depth, iteration = (steps[name].to_numpy() for name in ("text", "depth", "iteration"))
    here = (text == "own") & (depth == (depth.max() if c.comparison == "within" else c.a))
    rows = steps.loc[here & (iteration == c.a), ["question", "position", "token"]]
    before = rows.assign(position=rows["position"].astype("int64") + 1)
    return {"read": c.grid.of_table(before, "token"), "emitted": c.grid.of_table(rows, "token")}, ""


def classes_of(
    tokens: np.ndarray, token_class: Callable[[Iterable[int]], list[str]]
) -> tuple[np.ndarray, list[str]]:
    """Class of every token: codes of the shape of `tokens`, -1 where there is none, and the names."""
    there = np.isfinite(tokens)
    ids, inverse = np.unique(tokens[there].astype(np.int64), return_inverse=True)
    named = [str(name) for name in token_class(ids)]
    of_id, names = pd.factorize(np.asarray(named, dtype=object), sort=True)
    codes = np.full(tokens.shape, -1)
    codes[there] = of_id[inverse]
    return codes, [str(name) for name in names]


def _rates_by_class(role: str, codes: np.ndarray, names: list[str], c: Contrast) -> pd.DataFrame:
    """Shift rate of the (position, layer) pairs by class of the token, with question-level intervals."""
    there = c.grid.there & (codes >= 0)[..., None]
    q, p, _ = np.nonzero(there)
    rates = by("class", codes[q, p], q, c.grid.shifted(c.threshold)[there], *c.resampling)
    rates["class"] = [names[i] for i in rates["class"]]
    columns = ["class", "share", "low", "high", "pairs", "questions"]
    return rates[columns].assign(role=role)[["role", *columns]]
