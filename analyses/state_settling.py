"""Settling of the state: as a position is iterated further, does its state settle, cycle or drift?

Asked of one pass (`within`) that iterates often. With d(i, j) the relative L2 distance of a layer's output at
iterations i and j, and medians over the positions and layers of a question:

- **step** i: d(i, i+1), what one more iteration changes. It **settles** where each step is smaller than that
  before: the `pace`, the factor from step to step over the later half, is below 1. It **has settled** where
  steps fell first and then stay below a tenth of the first: a floor is left, in bfloat16 that of rounding.
- **travelled**: d(1, i), how far it has come. It **cycles** where that falls and rises again (`turns`), and
  **drifts** where steps do not shrink and it keeps growing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.parts.question_grid import mean_over_questions
from sst_interp.analyses.plots import BLUE, ORANGE, TEMPLATE, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, as_columns, questions_words

LEAST_STEPS = 3
"""Steps that a pace needs."""
FLOOR, SLOW = 0.1, 0.95
"""It has settled where the last step is below this share of the first, at a pace above this."""


@dataclass(frozen=True, eq=False)
class StateSettling(Result):
    """What becomes of the states of one pass with further iterations. All intervals resample questions."""

    steps: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per step: `from`, `to`, `step` and `travelled` (means over questions of their medians), each with
    `_low` and `_high`."""
    pace: Interval = UNKNOWN
    """Factor from one step to the next, over the later half of the steps (mean of its logarithm)."""
    pace_before: Interval = UNKNOWN
    """The same over the earlier half."""
    last: Interval = UNKNOWN
    """The last step over the first."""
    turns: Interval = UNKNOWN
    """How often, over the later half, the way from iteration 1 turns from growing to shrinking or back."""
    deepest: int = 0
    n_questions: int = 0
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return f"Settling of the state: one pass of {self.deepest} iterations"

    @property
    def table(self) -> pd.DataFrame:
        """A row per step."""
        return self.steps

    @property
    def kind(self) -> str:
        """`settles`, `has settled`, `drifts`, or `neither is shown`, by the intervals."""
        if self.pace_before.high < 1 and self.pace.high > SLOW and self.last.high < FLOOR:
            return "has settled"
        if self.pace.high < 1:
            return "settles"
        return "drifts" if self.pace.low > 1 else "neither is shown"

    @property
    def verdict(self) -> str:
        """The pace of the steps, how small they have become, and whether the way turns."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        first, last = self.steps.iloc[0], self.steps.iloc[-1]
        said = {
            "settles": "the state settles",
            "has settled": "the state has settled, down to a floor that further iterations do not lower",
            "drifts": "the steps grow, the state drifts",
            "neither is shown": "the steps neither shrink nor grow for certain",
        }[self.kind]
        cycling = self.kind != "has settled" and self.turns.low >= 1  # at a floor, noise turns
        turning = ", turning on its way" if cycling else ""
        last_share = self.last.text(percent=True)
        words = f"within one pass of {self.deepest} iterations {said}{turning} "
        words += f"({questions_words(self.n_questions)}). The step from iteration 1 to 2 changes a state by "
        words += f"{first['step']:.3g} of its length (median), that from {last['from']:.0f} to "
        words += f"{last['to']:.0f} by {last['step']:.3g}, {last_share} of it. Over the later half each step "
        words += f"is {self.pace.text()} times the one before (earlier half {self.pace_before.text()}), and "
        return f"{words}the way from iteration 1 turns {self.turns.text()} times."

    def figure(self) -> go.Figure:
        """Steps and the way from iteration 1."""
        if self.not_testable:
            return empty_figure("Does the state settle?", f"not testable: {self.not_testable}")
        figure = go.Figure()
        for column, words, color in (
            ("step", "one more iteration", BLUE),
            ("travelled", "from iteration 1", ORANGE),
        ):
            middle = self.steps[column]
            above, below = self.steps[f"{column}_high"] - middle, middle - self.steps[f"{column}_low"]
            figure.add_scatter(
                x=self.steps["to"], y=middle, name=words, mode="lines+markers", line={"color": color},
                error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1},
            )  # fmt: skip
        subtitle = f"within one pass of {self.deepest} iterations; {questions_words(self.n_questions)}"
        figure.update_layout(
            template=TEMPLATE, title={"text": "Does the state settle?", "subtitle": {"text": subtitle}}
        )
        figure.update_xaxes(title_text="iteration", dtick=1)
        figure.update_yaxes(title_text="relative change (L2, median)", type="log")
        return figure


def state_settling(pairs: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> StateSettling:
    """Whether the states of the deepest pass settle, cycle or drift.

    Args:
        pairs: a run's `pairs` table, with `relative_l2` of neighbouring iterations (`within`).
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; one whose verdict begins "not testable:" with fewer than three steps.
    """
    rows = pairs[(pairs["comparison"] == "within").to_numpy(dtype=bool)]
    medians = rows.groupby(["question", "a", "b"])["relative_l2"].median().unstack(["a", "b"])
    steps = [pair for pair in sorted(medians.columns) if pair[1] == pair[0] + 1]
    found = StateSettling(deepest=max((b for _, b in steps), default=0))
    if len(steps) < LEAST_STEPS:
        why = f"{LEAST_STEPS} steps from one iteration to the next are needed, there are {len(steps)}"
        return replace(found, not_testable=why)
    way = [(1, b) for _, b in steps]
    if missing := [pair for pair in way if pair not in medians.columns]:
        return replace(found, not_testable=f"the pair of iterations {missing[0]} was not captured")
    step, travelled = (medians[columns].to_numpy(dtype=float) for columns in (steps, way))
    there = np.isfinite(step).all(axis=1) & np.isfinite(travelled).all(axis=1) & (step > 0).all(axis=1)
    step, travelled = step[there], travelled[there]
    if not len(step):
        return replace(found, not_testable="no question's state changes at every step")
    log, half = np.log(step), len(steps) // 2

    def mean(values: np.ndarray) -> Interval:
        return mean_over_questions(values, resamples, seed)

    def factor(values: np.ndarray) -> Interval:
        found = mean(values)
        ends = np.exp([found.estimate, found.low, found.high]).tolist()
        return replace(found, estimate=ends[0], low=ends[1], high=ends[2])

    signs = np.sign(np.diff(travelled[:, half:], axis=1))
    table = [
        {"from": int(a), "to": int(b)} | as_columns(step=mean(step[:, i]), travelled=mean(travelled[:, i]))
        for i, (a, b) in enumerate(steps)
    ]
    return replace(
        found,
        steps=pd.DataFrame(table),
        pace=factor((log[:, -1] - log[:, half]) / (len(steps) - 1 - half)),
        pace_before=factor((log[:, half] - log[:, 0]) / half),
        last=mean(step[:, -1] / step[:, 0]),
        turns=mean((signs[:, 1:] * signs[:, :-1] < 0).sum(axis=1).astype(float)),
        n_questions=len(step),
    )
