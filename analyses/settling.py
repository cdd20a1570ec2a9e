"""Settling: as a question is thought about for longer, does its answer settle, cycle or drift?

Asked of a run with depths beyond the usual four (`beyond`, if one stands beside the run), one answer per
captured depth:

- **settles**: the same answer at the last two depths;
- **cycles**: another one than at the depth before, but one that was given at some earlier depth;
- **drifts**: one that was not given before;
- **no answer** at the deepest depth.

Depths that double (4, 8, 16) cannot tell an answer that alternates with every iteration from one that has
settled: for that, two depths that differ by an odd number are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.answers import NO_ANSWER, answers_of, mean_of
from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, add_line, canvas
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.statistics.bootstrap import Interval, as_columns, points_text, questions_words
from sst_interp.errors import Untestable

KINDS = ("settles", "cycles", "drifts", "no answer")


@dataclass(frozen=True, eq=False)
class Settling(Result):
    """What becomes of the answers of one run with depth. All intervals resample questions."""

    depths: tuple[int, ...]
    kinds: pd.DataFrame
    """A row per kind: questions, `share` with `_low` and `_high`."""
    steps: pd.DataFrame
    """A row per step from one captured depth to the next: `changed`, the share of questions whose answer
    changes, with `_low` and `_high`, and `per_depth`, that over the number of depths between."""
    settled: Interval
    """Share of questions that settle."""
    shuffled: Interval
    """The same had each question given its answers in random order: what few different answers alone give."""
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
        share = self.kinds.set_index("kind")["share"]
        words = (
            f"{answer} {questions_words(self.n_questions)}, depths {self.depths[0]} to {self.depths[-1]}: "
        )
        words += f"{self.settled.text(percent=True)} give the same answer at depths {self.depths[-2]} and "
        words += f"{self.depths[-1]}, in a random order {self.shuffled.estimate:.1%} would "
        words += f"({points_text(self.beyond)}). Of the others {share['cycles']:.1%} go back to an earlier "
        return f"{words}answer, {share['drifts']:.1%} give a new one, {share['no answer']:.1%} none."

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
        c: of a run; the run beside it with more depths is asked instead, if there is one.
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
        return mean_of(values, None, *c.resampling)

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
