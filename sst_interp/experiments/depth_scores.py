"""What iterating deeper does for a checkpoint: loss and accuracy by flat depth, models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import BLUE, GREY, ORANGE, TEMPLATE, VERMILLION
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import Interval, cluster_bootstrap, questions_words
from sst_interp.errors import SSTError, Untestable

ORACLE = "best of depths (oracle)"
"""Right at any depth. No policy reaches it: it is chosen with the answers in hand."""


@dataclass(frozen=True, eq=False)
class DepthScores(Result):
    """Scores of several models on several tasks at several depths; intervals resample questions."""

    scores: dict[tuple[str, str, str], Interval]
    """(task, depth in words, model) -> score: nats per answer token for tasks that end in `loss`, else the
    share of right answers."""
    differences: dict[tuple[str, str, str], Interval]
    """(task, depth in words, model) -> the model's score minus the reference's at its depth 1, paired by
    question."""
    reference: str | None
    """The model that the others are compared with."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per task and depth; a column per model, and its difference from the reference's depth 1."""
        rows = list(dict.fromkeys((task, depth) for task, depth, _ in self.scores))
        beside = [model for model in self._models if self.reference not in (None, model)]
        cells = [
            {"task": task, "depth": depth, "questions": self._n(task)}
            | {model: self._cell(task, depth, model) for model in self._models}
            | {f"{model} minus {self.reference}": self._difference(task, depth, model) for model in beside}
            for task, depth in rows
        ]
        return pd.DataFrame(cells)

    @property
    def verdict(self) -> str:
        """How many scores differ from the reference's beyond the interval, and the clearest of them."""
        if self.reference is None:
            return f"{self.n_words}; no baseline to compare with."
        apart = {
            key: d for key, d in self.differences.items() if key[1] != ORACLE and (d.low > 0 or d.high < 0)
        }
        compared = sum(depth != ORACLE for _, depth, _ in self.differences)
        words = f"{len(apart)} of {compared} scores differ from {self.reference}'s at depth 1. {self.n_words}"
        models = self._models
        clear = {key: abs(d.estimate) / (d.high - d.low) for key, d in apart.items()}
        most = sorted(apart, key=lambda key: (models.index(key[2]), -clear[key]))
        for task, depth, model in most[:3]:
            d, unit = apart[task, depth, model], "nats" if task.endswith("loss") else "of the questions"
            words += f"; {task}, {model} at depth {depth}: {d.estimate:+.3g} [{d.low:+.3g}, {d.high:+.3g}] "
            words += unit
        return words + "."

    @property
    def n_words(self) -> str:
        """How many questions the largest task has."""
        return f"At most {questions_words(max(i.n_questions for i in self.scores.values()))} a task"

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Loss and accuracy by depth"

    def figure(self) -> go.Figure:
        """A panel per task: score against depth, a line per model."""
        table = list(self.scores.items())
        tasks = list(dict.fromkeys(task for (task, _, _), _ in table))
        names = [f"{task} ({self._n(task)} questions)" for task in tasks]
        figure = make_subplots(rows=1, cols=len(tasks), subplot_titles=names, horizontal_spacing=0.06)
        for column, task in enumerate(tasks, 1):
            for color, model in zip([BLUE, ORANGE, GREY, VERMILLION] * 9, self._models, strict=False):
                line = [
                    (depth, i) for (t, depth, m), i in table if (t, m) == (task, model) and depth != ORACLE
                ]
                y = np.array([i.estimate for _, i in line])
                up = np.array([i.high for _, i in line]) - y
                down = y - np.array([i.low for _, i in line])
                figure.add_scatter(
                    x=[depth for depth, _ in line],
                    y=y,
                    error_y={"array": up, "arrayminus": down},
                    name=model,
                    legendgroup=model,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": color},
                    row=1,
                    col=column,
                )
            unit = "loss (nats per answer token)" if task.endswith("loss") else "share of right answers"
            figure.update_yaxes(title_text=unit, row=1, col=column)
        figure.update_xaxes(title_text="iteration depth")
        figure.update_layout(
            template=TEMPLATE, title=self.title + ", 95% intervals over questions", height=420
        )
        return figure

    @property
    def _models(self) -> list[str]:
        return list(dict.fromkeys(model for _, _, model in self.scores))

    def _n(self, task: str) -> int:
        return max(i.n_questions for (t, _, _), i in self.scores.items() if t == task)

    def _cell(self, task: str, depth: str, model: str) -> str:
        score = self.scores.get((task, depth, model))
        if score is None:
            return ""
        words = score.text(percent=not task.endswith("loss"))
        fewer = score.n_questions < self._n(task)
        return f"{words} ({score.n_questions} questions)" if fewer else words

    def _difference(self, task: str, depth: str, model: str) -> str:
        d = self.differences.get((task, depth, model))
        return "" if d is None else d.text(percent=not task.endswith("loss"))


def depth_scores(
    evaluations: Mapping[str, pd.DataFrame], reference: str | None = None, resamples: int = 2000
) -> DepthScores:
    """Scores with question-level intervals.

    Args:
        evaluations: model -> rows with task, depth, question, value, weight (`evaluation.tasks`).
        reference: the model that the others' paired differences are taken from; None for none.
        resamples: bootstrap resamples.

    Raises:
        Untestable: nothing was evaluated.
        SSTError: the reference is not among the models.
    """
    if reference is not None and reference not in evaluations:
        raise SSTError(f"reference {reference!r} is not among {', '.join(evaluations)}", "name one of them")
    scores: dict[tuple[str, str, str], Interval] = {}
    differences: dict[tuple[str, str, str], Interval] = {}
    wide = {model: _wide(rows) for model, rows in evaluations.items()}
    tasks = sorted({task for by_task in wide.values() for task in by_task})
    for task in tasks:
        depths = sorted({d for by_task in wide.values() if task in by_task for d in by_task[task][0].columns})
        names = [str(d) for d in depths] + ([] if task.endswith("loss") or len(depths) < 2 else [ORACLE])
        for name in names:
            for model, by_task in wide.items():
                if task not in by_task:
                    continue
                value, weight = by_task[task]
                if name == ORACLE:
                    if value.shape[1] < 2:
                        continue
                    column = value.max(axis=1)
                elif int(name) in value:
                    column = value[int(name)]
                else:
                    continue
                sums = np.stack([column, weight], axis=-1)
                scores[task, name, model] = cluster_bootstrap(sums, resamples=resamples)
                if reference in wide and task in wide[reference]:
                    theirs = wide[reference][task][0].iloc[:, 0].reindex(column.index)
                    both = theirs.notna().to_numpy()
                    paired = np.stack([(column - theirs)[both], weight[both]], axis=-1)
                    if (name, model) != ("1", reference):
                        differences[task, name, model] = cluster_bootstrap(paired, resamples=resamples)
    if not scores:
        raise Untestable("nothing was evaluated")
    return DepthScores(scores, differences, reference)


def _wide(rows: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, pd.Series]]:
    """Task -> (value [question, depth], weight [question])."""
    by_task = {}
    for task, part in rows.groupby("task"):
        value = part.pivot(index="question", columns="depth", values="value").dropna()
        weight = part.drop_duplicates("question").set_index("question")["weight"].reindex(value.index)
        by_task[str(task)] = (value, weight)
    return by_task
