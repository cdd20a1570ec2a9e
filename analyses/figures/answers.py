"""The figures of what iteration does to answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sst_interp.analyses.figures.outputs import add_line
from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, canvas, empty_figure
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.overthinking import Overthinking
    from sst_interp.analyses.settling import Settling


def accuracy(found: Overthinking) -> go.Figure:
    """Accuracy by flat depth; the oracle over depths and its controls as lines."""
    title = "Accuracy by flat depth"
    if found.by_depth.empty:
        return empty_figure(title, f"not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"every question at that depth; {questions_words(found.n_questions)}",
        "iteration depth",
        "share of questions right",
    )
    add_line(figure, found.by_depth["depth"], found.by_depth, "accuracy", "flat depth", BLUE)
    ends = [found.base - 0.3, found.deepest + 0.3]
    for value, name, colour, dash in (
        (found.oracle.estimate, "oracle over depths (not a policy)", VERMILLION, "dash"),
        (found.blind.estimate, "oracle, new answers guessed", ORANGE, "dot"),
        (found.unrelated.estimate, "oracle, depths unrelated", GREEN, "dot"),
        (found.guessing, "oracle over blind guesses", GREY, "dot"),
        (found.baseline.estimate, "matched baseline", SKY, "solid"),
    ):
        if math.isfinite(value):
            figure.add_scatter(
                x=ends, y=[value, value], mode="lines", name=f"{name} {value:.1%}", hoverinfo="name",
                line={"color": colour, "dash": dash, "width": 2},
            )  # fmt: skip
    figure.update_xaxes(tickvals=found.by_depth["depth"])
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}, margin={"t": 80})
    return figure


def broken_and_mended(found: Overthinking) -> go.Figure:
    """Right answers broken and wrong ones mended, from the shallowest depth to each."""
    title = "Answers broken and mended"
    if found.not_testable:
        return empty_figure(title, f"not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"from depth {found.base}: {found.right} right, {found.n_questions - found.right} wrong; "
        f"{questions_words(found.n_questions)}",
        "iteration depth",
        "questions (broken below 0)",
    )
    deeper = found.by_depth.iloc[1:]
    for column, sign, colour in (("mended", 1, BLUE), ("broken", -1, VERMILLION)):
        figure.add_bar(
            x=deeper["depth"], y=sign * deeper[column], name=column, marker={"color": colour},
            customdata=deeper[[column, "p"]],
            hovertemplate="depth %{x}: %{customdata[0]} " + column
            + "<br>exact McNemar p = %{customdata[1]:.2g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(tickvals=deeper["depth"])
    figure.update_layout(barmode="relative")
    return figure


def changes(found: Settling) -> go.Figure:
    """Share of answers that change from one captured depth to the next."""
    title = "Does the answer settle?"
    if found.not_testable:
        return empty_figure(title, f"not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"answers at depths {', '.join(map(str, found.depths))}; {questions_words(found.n_questions)}",
        "from one iteration depth to the next",
        "share of answers that change",
    )
    labels = found.steps["from"].astype(str) + " to " + found.steps["to"].astype(str)
    add_line(figure, labels, found.steps, "changed", "changed", BLUE)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
