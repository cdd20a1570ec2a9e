"""The figure of routing: every policy, flat depths and the oracle on the same axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sst_interp.analyses.figures.outputs import bars
from sst_interp.analyses.plots import BLUE, GREY, ORANGE, VERMILLION, canvas, empty_figure
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.routing import Routing

SERIES = (
    ("flat", "flat depths", GREY, "circle", "lines+markers+text"),
    ("policy", "policies, out of fold", BLUE, "diamond", "markers+text"),
    ("oracle", "oracle over depths (not a policy)", VERMILLION, "x", "markers"),
)


def accuracy_and_passes(found: Routing) -> go.Figure:
    """Accuracy against passes per question. Anything on the line between two flat depths is a coin toss."""
    title = "Accuracy against passes"
    if found.not_testable:
        return empty_figure(title, f"not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"{questions_words(found.n_questions)}; 95% intervals, questions resampled",
        "passes through the layer stack per question",
        "share of questions right",
    )
    if len(found.curve):
        curve = found.curve.sort_values("passes")
        figure.add_scatter(
            x=curve["passes"], y=curve["accuracy"], mode="lines", hoverinfo="skip",
            name="the probe at every threshold (the best of them is no policy)",
            line={"color": ORANGE, "width": 1, "dash": "dot"},
        )  # fmt: skip
    for kind, name, colour, symbol, mode in SERIES:
        rows = found.policies[found.policies["kind"] == kind]
        x, y = rows["passes"].to_numpy(), rows["accuracy"].to_numpy()
        figure.add_scatter(
            x=x, y=y, mode=mode, name=name, text=rows["name"], textposition="top center",
            textfont={"size": 11}, marker={"color": colour, "size": 10, "symbol": symbol},
            line={"color": colour, "dash": "dot"},
            error_x=bars(x, rows["passes_low"].to_numpy(), rows["passes_high"].to_numpy(), colour),
            error_y=bars(y, rows["accuracy_low"].to_numpy(), rows["accuracy_high"].to_numpy(), colour),
            customdata=rows[["broken", "mended", "conservative", "saved"]],
            hovertemplate="%{text}: %{y:.1%} at %{x:.1f} passes<br>%{customdata[0]} broken, %{customdata[1]} "
            "mended, %{customdata[2]} conservative errors, %{customdata[3]:.0%} of passes saved"
            "<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%")
    figure.update_layout(height=480)
    return figure
