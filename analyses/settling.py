"""Settling: as a question is thought about for longer, does its answer settle, cycle or drift?

Asked of a run with depths beyond the usual four, one answer per captured depth:

- **settles**: the same answer at the last two depths;
- **cycles**: another one than at the depth before, but one that was given at some earlier depth;
- **drifts**: one that was not given before;
- **no answer** at the deepest depth.

Depths that double (4, 8, 16) cannot tell an answer that alternates with every iteration from one that has
settled: for that, two depths that differ by an odd number are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.figures import answers as answer_figures
from sst_interp.analyses.parts.answers import NO_ANSWER, answers_of, mean_of
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    points_text,
    questions_words,
)

KINDS = ("settles", "cycles", "drifts", "no answer")


@dataclass(frozen=True, eq=False)
class Settling(Result):
    """What becomes of the answers of one run with depth. All intervals resample questions."""

    depths: tuple[int, ...] = ()
    kinds: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per kind: questions, `share` with `_low` and `_high`."""
    steps: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per step from one captured depth to the next: `changed`, the share of questions whose answer
    changes, with `_low` and `_high`, and `per_depth`, that over the number of depths between."""
    settled: Interval = UNKNOWN
    """Share of questions that settle."""
    shuffled: Interval = UNKNOWN
    """The same had each question given its answers in random order: what few different answers alone give."""
    beyond: Interval = UNKNOWN
    """settled - shuffled."""
    of_question: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns question, id, kind, changes (steps at which the answer changes)."""
    n_questions: int = 0
    n_excluded: int = 0
    """Questions without a row at every depth."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

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
        """Shares of the kinds against a shuffled order, and the changes at the first and last step."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        share = self.kinds.set_index("kind")["share"]
        words = f"from depth {self.depths[0]} to {self.depths[-1]}, {questions_words(self.n_questions)}: "
        words += f"{self.settled.text(percent=True)} settle (the same answer at depths {self.depths[-2]} and "
        words += f"{self.depths[-1]}), {share['cycles']:.1%} go back to an earlier answer, "
        words += f"{share['drifts']:.1%} give a new one, {share['no answer']:.1%} none. In a random order of "
        words += f"the same answers {self.shuffled.estimate:.1%} would settle (difference "
        words += f"{points_text(self.beyond)}"
        if self.beyond.known and self.beyond.low <= 0:
            words += "; no settling is shown"
        first, last = self.steps.iloc[0], self.steps.iloc[-1]
        words += f"). {first['changed']:.1%} of the answers change from depth {first['from']:.0f} to "
        return words + (
            f"{first['to']:.0f}, {last['changed']:.1%} from {last['from']:.0f} to {last['to']:.0f}."
        )

    def figure(self) -> go.Figure:
        """Share of answers that change, step by step."""
        return answer_figures.changes(self)


def settling(
    questions: pd.DataFrame, start: int | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Settling:
    """Whether answers settle, cycle or drift with depth.

    Args:
        questions: a run's `questions` table, with at least three depths.
        start: the first depth to look at; default: the shallowest.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; one whose verdict begins "not testable:" if there are fewer than three depths or no
        answers.
    """
    found = Settling()
    if not len(questions):
        return replace(found, not_testable="the table questions of this run is empty")
    if start is not None:
        questions = questions[(questions["depth"] >= start).to_numpy(dtype=bool)]
    answers = answers_of(questions)
    found = replace(found, depths=tuple(int(d) for d in answers.depths), n_excluded=answers.n_excluded)
    if answers.codes is None:
        return replace(found, not_testable="this run has no answers")
    if len(found.depths) < 3:
        return replace(found, not_testable=f"three depths are needed, there are {len(found.depths)}")
    if not len(answers.questions):
        return replace(found, not_testable="no question has an answer at every depth")
    codes = answers.codes
    last, before, k = codes[:, -1], codes[:, -2], codes.shape[1]
    returns = (codes[:, :-2] == last[:, None]).any(axis=1)
    kind = np.select([last == NO_ANSWER, last == before, returns], [3, 0, 1], default=2)
    moves = np.diff(codes, axis=1) != 0
    given = codes != NO_ANSWER
    equal = (codes[:, :, None] == codes[:, None, :]) & given[:, None, :]
    by_chance = (equal.sum(axis=(1, 2)) - given.sum(axis=1)) / (k * (k - 1))  # ordered pairs of depths

    def mean(values: np.ndarray) -> Interval:
        return mean_of(values, None, resamples, seed)

    kinds = [
        {"kind": name, "questions": int((kind == i).sum())} | as_columns(share=mean(kind == i))
        for i, name in enumerate(KINDS)
    ]
    steps = []
    for i, (one, other) in enumerate(zip(found.depths[:-1], found.depths[1:], strict=True)):
        changed = mean(moves[:, i])
        row = {"from": one, "to": other} | as_columns(changed=changed)
        steps.append(row | {"per_depth": changed.estimate / (other - one)})
    names = {"question": answers.questions, "id": answers.ids}
    return replace(
        found,
        kinds=pd.DataFrame(kinds),
        steps=pd.DataFrame(steps),
        settled=mean(kind == 0),
        shuffled=mean(by_chance),
        beyond=mean((kind == 0) - by_chance),
        of_question=pd.DataFrame(names | {"kind": np.array(KINDS)[kind], "changes": moves.sum(axis=1)}),
        n_questions=len(codes),
    )
