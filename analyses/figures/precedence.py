"""The figures of precedence: the order of shift and argmax, how often the argmax changes, and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, Line, canvas, empty_figure, lines
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.precedence import Precedence

WORDS = {"before": "at an earlier step", "together": "at the same step", "after": "later", "alone": "never"}
NUDGES = {"random": "nudges, random", "elsewhere": "nudges, as elsewhere in the text"}
SITES = {"output": "last layer's output", "stream": "stream states<br>handed in"}
RUN, SHUFFLED, TRUE = "this run, any layer", "shifts shuffled", "the true change"
LAST = "the true change, last layer only"
COLOURS = {
    RUN: BLUE,
    SHUFFLED: GREY,
    TRUE: SKY,
    LAST: SKY,
    NUDGES["random"]: ORANGE,
    NUDGES["elsewhere"]: GREEN,
}

Bar = tuple[str, str, float, float, float]
"""Label, series, share and its ends."""


def figures_of(found: Precedence) -> dict[str, go.Figure]:
    """Every figure of one comparison by name."""
    if found.not_testable:
        words = f"not testable: {found.not_testable}"
        return {name: empty_figure(found.comparison, words) for name in ("order", "changed", "by_layer")}
    n = f"{questions_words(found.n_questions)}, {found.n_positions:,} positions"
    subtitle = f"{found.words}; {n}; shifted: overlap of some layer below {found.threshold:.4g}"
    return {
        "order": order(found, subtitle),
        "changed": changed(found, subtitle),
        "by_layer": by_layer(found, subtitle),
    }


def order(found: Precedence, subtitle: str) -> go.Figure:
    """When the state shifted, of the positions whose argmax changes: the run, shuffled, and under nudges."""
    bars: list[Bar] = []
    for row in _rows(found.orders[found.orders["given"] == "the argmax changes"]):
        label = WORDS[row["order"]]
        bars.append((label, RUN, row["share"], row["low"], row["high"]))
        bars.append((label, SHUFFLED, row["null"], row["null_low"], row["null_high"]))
    for row in _rows(found.by_construction):
        series = NUDGES.get(row["direction"], LAST)
        bars.append((WORDS[row["order"]], series, row["share"], row["low"], row["high"]))
    return _grouped(
        "When the state shifted, where the argmax changes",
        subtitle,
        "when the state shifted, seen from the argmax",
        "share of changed argmaxes",
        bars,
    )


def changed(found: Precedence, subtitle: str) -> go.Figure:
    """How often the argmax changes at the last step: where the state shifted or not, and under nudges."""
    at_last = found.changed[found.changed["step"] == found.steps[-1]]
    bars: list[Bar] = [
        (f"{row['where']}:<br>all positions", RUN, row["changed"], row["low"], row["high"])
        for row in _rows(at_last)
        if row["positions"]
    ]
    for row in _rows(found.beside_nudges):
        series = NUDGES.get(row["direction"], TRUE)
        ends = row["changed"], row["changed_low"], row["changed_high"]
        bars.append((f"{row['where']}:<br>{SITES[row['site']]}", series, *ends))
    return _grouped(
        "How often the argmax changes",
        subtitle,
        "where the state shifted or not, and what was changed",
        "share of positions",
        bars,
    )


def by_layer(found: Precedence, subtitle: str) -> go.Figure:
    """How often the argmax changes, by the lowest layer that shifted."""
    title, table = "Where the shift begins", found.by_layer
    if table.empty:
        return empty_figure(title, f"{found.words}: no position shifts")
    line = Line("argmax changed", table["layer"], table["share"], table["low"], table["high"])
    figure = lines(
        title,
        subtitle,
        "lowest shifted layer (0-based)",
        "argmax changed, share<br>of positions",
        [line],
        True,
    )
    return figure.update_traces(showlegend=False)


def _grouped(title: str, subtitle: str, x: str, y: str, bars: list[Bar]) -> go.Figure:
    """Bars side by side with their 95% intervals; the legend below, where it hides no title."""
    figure = canvas(title, subtitle, x, y)
    labels = list(dict.fromkeys(label for label, *_ in bars))
    for series, colour in COLOURS.items():
        own = [bar for bar in bars if bar[1] == series]
        if not own:
            continue
        share, low, high = (np.array([bar[i] for bar in own], dtype=float) for i in (2, 3, 4))
        error = {
            "type": "data", "symmetric": False, "thickness": 1.5, "color": GREY,
            "array": np.nan_to_num(high - share), "arrayminus": np.nan_to_num(share - low),
        }  # fmt: skip
        figure.add_bar(
            x=[bar[0] for bar in own], y=share, name=series, error_y=error, marker={"color": colour},
            customdata=np.stack([low, high], axis=1),
            hovertemplate="%{x}: %{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(categoryorder="array", categoryarray=labels)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    legend = {"yref": "container", "yanchor": "bottom", "y": 0.01, "x": 0}
    figure.update_layout(barmode="group", height=430, margin={"b": 140}, legend=legend)
    return figure


def _rows(table: pd.DataFrame) -> list[dict]:
    return table.to_dict("records")
