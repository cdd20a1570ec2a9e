"""Results of a training: its loss curves, and its scores by iteration depth beside other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import BLUE, GREY, ORANGE, SKY, TEMPLATE, VERMILLION, error_bars
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import Interval, cluster_bootstrap, questions_words
from sst_interp.errors import SSTError, Untestable
from sst_interp.training.card import SMOOTHING, log_words, looks

ORACLE = "best of depths (oracle)"
"""Right at any depth. No policy reaches it: it is chosen with the answers in hand."""
WEIGHTS = {
    "blend weight alpha": ("alpha_max", "alpha_mean", "alpha_min"),
    "residual scalar gamma": ("gamma_mean",),
}
"""Axis -> the log's columns of the stream's own weights."""


@dataclass(frozen=True, eq=False)
class DepthScores(Result):
    """Scores of several models on several tasks at several depths; intervals resample questions."""

    scores: dict[tuple[str, str, str], Interval]
    """(task, depth in words, model) -> score: nats per answer token for tasks that end in `loss`, else the
    share of right answers."""
    differences: dict[tuple[str, str, str], Interval]
    """(task, depth in words, model) -> the score minus the reference's at depth 1, paired by question."""
    reference: str | None
    """The model that the others are compared with."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per task and depth; a column per model, and its difference from the reference's depth 1."""
        beside = [model for model in self._models if self.reference not in (None, model)]
        cells = [
            {"task": task, "depth": depth, "questions": self._n(task)}
            | {model: self._cell(task, depth, model) for model in self._models}
            | {f"{model} minus {self.reference}": self._difference(task, depth, model) for model in beside}
            for task, depth in dict.fromkeys((task, depth) for task, depth, _ in self.scores)
        ]
        return pd.DataFrame(cells)

    @property
    def verdict(self) -> str:
        """How many scores differ from the reference's beyond the interval, and the clearest three."""
        n = f"At most {questions_words(max(i.n_questions for i in self.scores.values()))} a task"
        if self.reference is None:
            return f"{n}; no baseline to compare with."
        compared = {key: d for key, d in self.differences.items() if key[1] != ORACLE}
        apart = {key: d for key, d in compared.items() if d.low > 0 or d.high < 0}
        words = f"{len(apart)} of {len(compared)} scores differ from {self.reference}'s at depth 1. {n}"
        clear = {key: abs(d.estimate) / (d.high - d.low) for key, d in apart.items()}
        most = sorted(apart, key=lambda key: (self._models.index(key[2]), -clear[key]))
        for task, depth, model in most[:3]:
            d, unit = apart[task, depth, model], "nats" if task.endswith("loss") else "of the questions"
            words += f"; {task}, {model} at depth {depth}: {d.estimate:+.3g} [{d.low:+.3g}, {d.high:+.3g}] "
            words += unit
        return words + "."

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Loss and accuracy by depth"

    def figure(self) -> go.Figure:
        """A panel per task: score against depth, a line per model."""
        tasks = list(dict.fromkeys(task for task, _, _ in self.scores))
        names = [f"{task} ({self._n(task)} questions)" for task in tasks]
        figure = make_subplots(rows=1, cols=len(tasks), subplot_titles=names, horizontal_spacing=0.06)
        colours = dict(zip(self._models, [BLUE, ORANGE, GREY, VERMILLION] * 9, strict=False))
        for column, task in enumerate(tasks, 1):
            for model, colour in colours.items():
                own = {d: i for (t, d, m), i in self.scores.items() if (t, m) == (task, model)}
                own.pop(ORACLE, None)
                y, low, high = np.array([(i.estimate, i.low, i.high) for i in own.values()]).reshape(-1, 3).T
                figure.add_scatter(
                    x=list(own), y=y, error_y=error_bars(y, low, high, colour), name=model, legendgroup=model,
                    showlegend=column == 1, mode="lines+markers", line={"color": colour}, row=1, col=column,
                )  # fmt: skip
            unit = "loss (nats per answer token)" if task.endswith("loss") else "share of right answers"
            figure.update_yaxes(title_text=unit, row=1, col=column)
        figure.update_xaxes(title_text="iteration depth")
        title = f"{self.title}, 95% intervals over questions"
        return figure.update_layout(template=TEMPLATE, title=title, height=420)

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
        evaluations: model -> rows as `sst_interp.training.evaluation.evaluate` returns them.
        reference: the model that the others' paired differences are taken from; None for none.

    Raises:
        Untestable: nothing was evaluated.
        SSTError: the reference is not among the models.
    """
    if reference is not None and reference not in evaluations:
        raise SSTError(f"reference {reference!r} is not among {', '.join(evaluations)}", "name one of them")
    scores: dict[tuple[str, str, str], Interval] = {}
    differences: dict[tuple[str, str, str], Interval] = {}
    wide = {model: _by_task(rows) for model, rows in evaluations.items()}
    for task in sorted({task for tasks in wide.values() for task in tasks}):
        here = {model: tasks[task] for model, tasks in wide.items() if task in tasks}
        depths = {depth for value, _ in here.values() for depth in value}
        for depth in sorted(depths, key=lambda depth: (depth == ORACLE, depth)):
            for model, (value, weight) in here.items():
                if depth not in value:
                    continue
                key, column = (task, str(depth), model), value[depth]
                scores[key] = cluster_bootstrap(np.stack([column, weight], axis=-1), resamples=resamples)
                if reference in here and key[1:] != ("1", reference):
                    theirs = here[reference][0].iloc[:, 0].reindex(column.index)
                    both = theirs.notna().to_numpy()
                    paired = np.stack([(column - theirs)[both], weight[both]], axis=-1)
                    differences[key] = cluster_bootstrap(paired, resamples=resamples)
    if not scores:
        raise Untestable("nothing was evaluated")
    return DepthScores(scores, differences, reference)


def _by_task(rows: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, pd.Series]]:
    """Task -> (value [question, depth and `ORACLE`], weight [question])."""
    by_task = {}
    for task, part in rows.groupby("task"):
        value = part.pivot(index="question", columns="depth", values="value").dropna()
        if value.shape[1] > 1 and not str(task).endswith("loss"):
            value[ORACLE] = value.max(axis=1)
        weight = part.drop_duplicates("question").set_index("question")["weight"].reindex(value.index)
        by_task[str(task)] = (value, weight)
    return by_task


@dataclass(frozen=True, eq=False)
class TrainingCurves(Result):
    """The log of one training."""

    log: pd.DataFrame
    """A row per step: step, loss, tokens, seconds, alpha_mean ... as `training.jsonl` has them."""
    name: str

    @property
    def table(self) -> pd.DataFrame:
        """A row per measurement of the held-out examples."""
        return looks(self.log)

    @property
    def verdict(self) -> str:
        """First and last losses, speed, and the stream's weights."""
        return log_words(self.log, self.name)

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Training"

    def figure(self) -> go.Figure:
        """Loss above, the stream's own weights below, against the step."""
        steps, held_out = self.log.dropna(subset=["loss"]), self.table
        stream = {
            axis: [c for c in names if c in steps and steps[c].notna().any()]
            for axis, names in WEIGHTS.items()
        }
        stream = {axis: names for axis, names in stream.items() if names}
        figure = make_subplots(rows=1 + len(stream), cols=1, shared_xaxes=True, vertical_spacing=0.08)
        figure.add_scatter(
            x=steps["step"], y=steps["loss"], mode="markers", name="one step", opacity=0.5,
            marker={"color": GREY, "size": 4}, row=1, col=1,
        )  # fmt: skip
        smooth = steps["loss"].rolling(SMOOTHING, min_periods=1).mean()
        figure.add_scatter(
            x=steps["step"], y=smooth, name=f"mean of {SMOOTHING} steps", line={"color": BLUE}, row=1, col=1
        )
        for column, words, color in (
            ("held_out_exact", "held out, exact", VERMILLION),
            ("held_out_depth_4", "held out, depth 4", SKY),
            ("held_out_as_trained", "held out, as trained", ORANGE),
        ):
            if column in held_out:
                figure.add_scatter(
                    x=held_out["step"], y=held_out[column], name=words, mode="lines+markers",
                    line={"color": color}, row=1, col=1,
                )  # fmt: skip
        figure.update_yaxes(title_text="loss (nats per answer token)", type="log", dtick="D1", row=1, col=1)
        for row, (axis, names) in enumerate(stream.items(), 2):
            for column in names:
                line = {"color": BLUE, "dash": "solid" if column.endswith("mean") else "dot"}
                name = column.replace("_", " ")
                figure.add_scatter(x=steps["step"], y=steps[column], name=name, line=line, row=row, col=1)
            figure.update_yaxes(title_text=axis, row=row, col=1)
        figure.update_xaxes(title_text="step", row=1 + len(stream), col=1)
        title, height = f"Training {self.name}", 380 + 240 * len(stream)
        return figure.update_layout(template=TEMPLATE, title=title, height=height)


def training_curves(log: Sequence[dict[str, Any]] | pd.DataFrame, name: str = "checkpoint") -> TrainingCurves:
    """The curves of a training's log (`sst_interp.training.card.read_log`).

    Raises:
        Untestable: no step was taken.
    """
    rows = pd.DataFrame(log)
    if "loss" not in rows or rows["loss"].isna().all():
        raise Untestable("no step was taken")
    return TrainingCurves(rows, name)
