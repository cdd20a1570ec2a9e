"""Settling: with ever more iterations, do the answers and the states settle, cycle or drift?

`settling` asks for the answers of a run with many depths. An answer **settles** if it is the same at the last
two depths, **cycles** if it goes back to one given before, and **drifts** if it is new. Depths that double
(4, 8, 16) cannot tell an answer that alternates with every iteration from one that has settled.

`state_settling` asks for the states of one pass of many iterations. d(i, j) is the relative L2 distance of a
layer's output at iterations i and j, the median over the positions and layers of a question. A state
**settles** if its steps d(i, i + 1) shrink, **has settled** if they shrank to a floor, and **drifts** if they
grow. It **cycles** if the way d(1, i) shrinks and grows again (`turns`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.answers import NO_ANSWER, answers_of
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, ORANGE, add_line, canvas
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    as_columns,
    mean_over_questions,
    points_text,
    questions_words,
)
from sst_interp.errors import Untestable

KINDS = ("settles", "cycles", "drifts", "no answer")


@dataclass(frozen=True, eq=False)
class Settling(Result):
    """What depth does to the answers of a run. All intervals resample questions."""

    depths: tuple[int, ...]
    kinds: pd.DataFrame
    """A row per kind: questions, `share` with `_low` and `_high`."""
    steps: pd.DataFrame
    """A row per step from one captured depth to the next: `changed`, the share of questions whose answer
    changes, with `_low` and `_high`, and `per_depth`, that over the number of depths between."""
    settled: Interval
    """Share of questions that settle."""
    shuffled: Interval
    """The same if each question gave its answers in random order."""
    beyond: Interval
    """settled - shuffled."""
    of_question: pd.DataFrame
    """Columns question, id, kind, changes (steps at which the answer changes)."""
    n_questions: int
    n_excluded: int
    """Questions without a row at every depth."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Settling: answers at depths " + ", ".join(map(str, self.depths))

    @property
    def table(self) -> pd.DataFrame:
        """A row per kind."""
        return self.kinds

    @property
    def verdict(self) -> str:
        """Whether answers settle beyond a shuffled order, and what the others do."""
        answer = "Answers settle no more than in a random order."
        if self.beyond.known and self.beyond.low > 0:
            answer = "Answers settle: the last two depths agree more than shuffled ones."
        elif self.beyond.known and self.beyond.high < 0:
            answer = "Answers alternate: the last two depths agree less than shuffled ones."
        n, last = questions_words(self.n_questions), self.depths[-1]
        words = f"{answer} {n}, depths {self.depths[0]} to {last}: {self.settled.text(percent=True)} give "
        words += f"the same answer at depths {self.depths[-2]} and {last}, against "
        return f"{words}{self.shuffled.estimate:.1%} in a random order ({points_text(self.beyond)})."

    def figure(self) -> go.Figure:
        """Share of answers that change from one captured depth to the next."""
        figure = canvas(
            "Does the answer settle?",
            f"answers at depths {', '.join(map(str, self.depths))}; {questions_words(self.n_questions)}",
            "from one iteration depth to the next",
            "share of answers that change",
        )
        labels = self.steps["from"].astype(str) + " to " + self.steps["to"].astype(str)
        add_line(figure, labels, self.steps, "changed", "changed", BLUE)
        return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


@analysis("Settling", "Do answers settle with more depth?", needs=("questions",), per="run", order=130)
def settling(c: Contrast, start: int | None = None) -> Settling:
    """Whether answers settle, cycle or drift with depth.

    Args:
        c: of a run. The run beside it with more depths is asked instead, if there is one.
        start: the first depth to look at; default: the shallowest.

    Raises:
        Untestable: if there are fewer than three depths, or no answers.
    """
    beyond = c.beside.get("beyond")
    questions = None if beyond is None else beyond.get("questions")
    if questions is None:
        questions = c.tables("questions")
    if start is not None:
        questions = questions[(questions["depth"] >= start).to_numpy(dtype=bool)]
    answers = answers_of(questions)
    depths = tuple(int(d) for d in answers.depths)
    codes = answers.codes
    if codes is None:
        raise Untestable("this run has no answers")
    if len(depths) < 3:
        raise Untestable(f"three depths are needed, there are {len(depths)}")
    if not len(codes):
        raise Untestable("no question has an answer at every depth")
    last, before, k = codes[:, -1], codes[:, -2], codes.shape[1]
    returns = (codes[:, :-2] == last[:, None]).any(axis=1)
    kind = np.select([last == NO_ANSWER, last == before, returns], [3, 0, 1], default=2)
    moves = np.diff(codes, axis=1) != 0
    given = codes != NO_ANSWER
    equal = (codes[:, :, None] == codes[:, None, :]) & given[:, None, :]
    by_chance = (equal.sum(axis=(1, 2)) - given.sum(axis=1)) / (k * (k - 1))  # ordered pairs of depths

    def mean(values: np.ndarray) -> Interval:
        return mean_over_questions(values, *c.resampling)

    kinds = [
        {"kind": name, "questions": int((kind == i).sum())} | as_columns(share=mean(kind == i))
        for i, name in enumerate(KINDS)
    ]
    steps = []
    for i, (one, other) in enumerate(pairwise(depths)):
        changed = mean(moves[:, i])
        row = {"from": one, "to": other} | as_columns(changed=changed)
        steps.append(row | {"per_depth": changed.estimate / (other - one)})
    names = {"question": answers.questions, "id": answers.ids}
    return Settling(
        depths,
        kinds=pd.DataFrame(kinds),
        steps=pd.DataFrame(steps),
        settled=mean(kind == 0),
        shuffled=mean(by_chance),
        beyond=mean((kind == 0) - by_chance),
        of_question=pd.DataFrame(names | {"kind": np.array(KINDS)[kind], "changes": moves.sum(axis=1)}),
        n_questions=len(codes),
        n_excluded=answers.n_excluded,
    )


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
    """What more iterations do to the states of one pass. All intervals resample questions."""

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
        words += f"{questions_words(self.n_questions)}: iteration 2 changes a state by {first['step']:.3g} "
        words += f"of its length (median), iteration {last['to']:.0f} by {last['step']:.3g}. Over the later "
        words += f"half each step is {self.pace.text()} times the one before."
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
            add_line(figure, self.steps["to"], self.steps, column, words, colour)
        return figure.update_xaxes(dtick=1).update_yaxes(type="log")


@analysis(
    "Settling of the state",
    "Does the state settle, cycle or drift?",
    needs=("pairs",),
    per="run",
    order=140,
)
def state_settling(c: Contrast) -> StateSettling:
    """Whether the states of the deepest pass settle, cycle or drift; of the run with more depths, if given.

    Raises:
        Untestable: with fewer than three steps, or without a pair (1, b).
    """
    beyond = c.beside.get("beyond")
    if beyond is None or beyond.get("pairs", "within") is None:
        beyond = c.tables
    of_pass = replace(c, tables=beyond, comparison="within", pair=None)
    pairs = of_pass.pairs_there
    each = [of_pass.at(*pair).rows.groupby("question")["relative_l2"].median() for pair in pairs]
    medians = pd.concat(each, axis=1).to_numpy(dtype=float)
    steps = [(a, b) for a, b in pairs if b == a + 1]
    if len(steps) < LEAST_STEPS:
        raise Untestable(
            f"{LEAST_STEPS} steps from one iteration to the next are needed, there are {len(steps)}"
        )
    way = [(1, b) for _, b in steps]
    if missing := [pair for pair in way if pair not in pairs]:
        raise Untestable(f"the pair of iterations {missing[0]} was not captured")
    step, travelled = (medians[:, [pairs.index(pair) for pair in columns]] for columns in (steps, way))
    there = np.isfinite(step).all(axis=1) & np.isfinite(travelled).all(axis=1) & (step > 0).all(axis=1)
    step, travelled = step[there], travelled[there]
    if not len(step):
        raise Untestable("no question's state changes at every step")
    log, half = np.log(step), len(steps) // 2

    def mean(values: np.ndarray) -> Interval:
        return mean_over_questions(values, *c.resampling)

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
