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

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, ORANGE, canvas, error_bars
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.statistics.bootstrap import Interval, as_columns, cluster_bootstrap, questions_words
from sst_interp.errors import Untestable

LEAST_STEPS = 3
"""Steps that a pace needs."""
FLOOR, SLOW = 0.1, 0.95
"""It has settled where the last step is below this share of the first, at a pace above this."""
ANSWERS = {
    "settles": "The state settles: each step is smaller than the one before.",
    "has settled": "The state has settled, down to a floor that stays.",
    "drifts": "The state drifts: its steps grow.",
    "neither is shown": "The steps neither shrink nor grow for certain.",
}


@dataclass(frozen=True, eq=False)
class StateSettling(Result):
    """What becomes of the states of one pass with further iterations. All intervals resample questions."""

    steps: pd.DataFrame
    """A row per step: `from`, `to`, `step` and `travelled` (means over questions of their medians), each with
    `_low` and `_high`."""
    pace: Interval
    """Factor from one step to the next, over the later half of the steps (mean of its logarithm)."""
    pace_before: Interval
    """The same over the earlier half."""
    last: Interval
    """The last step over the first."""
    turns: Interval
    """How often, over the later half, the way from iteration 1 turns from growing to shrinking or back."""
    deepest: int
    n_questions: int

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
        """What the steps do, how small they have become, and whether the way turns."""
        first, last = self.steps.iloc[0], self.steps.iloc[-1]
        words = f"{ANSWERS[self.kind]} Within one pass of {self.deepest} iterations, "
        words += (
            f"{questions_words(self.n_questions)}: iteration 2 changes a state by {first['step']:.3g} of "
        )
        words += f"its length (median), iteration {last['to']:.0f} by {last['step']:.3g}, "
        words += (
            f"{self.last.text(percent=True)} of that. Over the later half each step is {self.pace.text()} "
        )
        words += f"times the one before (earlier half {self.pace_before.estimate:.3g})."
        if self.kind != "has settled" and self.turns.low >= 1:  # at a floor, noise turns
            words += f" The way from iteration 1 turns {self.turns.text()} times."
        return words

    def figure(self) -> go.Figure:
        """Steps and the way from iteration 1."""
        subtitle = f"within one pass of {self.deepest} iterations; {questions_words(self.n_questions)}"
        figure = canvas("Does the state settle?", subtitle, "iteration", "relative change (L2, median)")
        for column, words, colour in (
            ("step", "one more iteration", BLUE),
            ("travelled", "from iteration 1", ORANGE),
        ):
            middle, low, high = (self.steps[f"{column}{end}"].to_numpy() for end in ("", "_low", "_high"))
            figure.add_scatter(
                x=self.steps["to"], y=middle, name=words, mode="lines+markers", line={"color": colour},
                error_y=error_bars(middle, low, high, colour),
            )  # fmt: skip
        return figure.update_xaxes(dtick=1).update_yaxes(type="log")


@analysis(
    "Settling of the state",
    "Does the state settle, cycle or drift?",
    needs=("pairs",),
    per="run",
    order=140,
)
def state_settling(c: Contrast) -> StateSettling:
    """Whether the states of the deepest pass settle, cycle or drift; of the run beside it with more depths,
    if there is one.

    Raises:
        Untestable: with fewer than three steps, or without a pair (1, b).
    """
    beyond = c.beside.get("beyond")
    if beyond is None or beyond.get("pairs", "within") is None:
        beyond = c.tables
    rows = beyond("pairs", "within")
    medians = rows.groupby(["question", "a", "b"])["relative_l2"].median().unstack(["a", "b"])
    pairs = sorted((int(a), int(b)) for a, b in medians.columns)
    steps = [(a, b) for a, b in pairs if b == a + 1]
    if len(steps) < LEAST_STEPS:
        raise Untestable(
            f"{LEAST_STEPS} steps from one iteration to the next are needed, there are {len(steps)}"
        )
    way = [(1, b) for _, b in steps]
    if missing := [pair for pair in way if pair not in medians.columns]:
        raise Untestable(f"the pair of iterations {missing[0]} was not captured")
    step, travelled = (medians[columns].to_numpy(dtype=float) for columns in (steps, way))
    there = np.isfinite(step).all(axis=1) & np.isfinite(travelled).all(axis=1) & (step > 0).all(axis=1)
    step, travelled = step[there], travelled[there]
    if not len(step):
        raise Untestable("no question's state changes at every step")
    log, half = np.log(step), len(steps) // 2

    def mean(values: np.ndarray) -> Interval:
        sums = np.stack([values, np.ones(len(values))], axis=1)
        return cluster_bootstrap(sums, resamples=c.resampling.resamples, seed=c.resampling.seed)

    def factor(values: np.ndarray) -> Interval:
        logs = mean(values)
        estimate, low, high = np.exp([logs.estimate, logs.low, logs.high]).tolist()
        return replace(logs, estimate=estimate, low=low, high=high)

    signs = np.sign(np.diff(travelled[:, half:], axis=1))
    table = [
        {"from": a, "to": b} | as_columns(step=mean(step[:, i]), travelled=mean(travelled[:, i]))
        for i, (a, b) in enumerate(steps)
    ]
    return StateSettling(
        pd.DataFrame(table),
        pace=factor((log[:, -1] - log[:, half]) / (len(steps) - 1 - half)),
        pace_before=factor((log[:, half] - log[:, 0]) / half),
        last=mean(step[:, -1] / step[:, 0]),
        turns=mean((signs[:, 1:] * signs[:, :-1] < 0).sum(axis=1).astype(float)),
        deepest=max(b for _, b in steps),
        n_questions=len(step),
    )
