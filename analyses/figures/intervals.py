"""Estimates with their intervals, drawn: lines with bands, and dots with bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import overlap as figures

COLOURS = (figures.BLUE, figures.VERMILLION, figures.GREEN, figures.ORANGE, figures.SKY)


class Line(NamedTuple):
    """One line and its band."""

    name: str
    x: Sequence[float] | np.ndarray | pd.Series
    y: Sequence[float] | np.ndarray | pd.Series
    low: Sequence[float] | np.ndarray | pd.Series
    """Lower ends of the intervals; NaN where there is none."""
    high: Sequence[float] | np.ndarray | pd.Series


class Dot(NamedTuple):
    """One estimate and its interval."""

    label: str
    """What it is, on the vertical axis."""
    series: str
    """Which colour it has, in the legend."""
    estimate: float
    low: float
    high: float


def lines(
    title: str, subtitle: str, x: str, y: str, series: Sequence[Line], percent: bool = False
) -> go.Figure:
    """Lines with bands for their 95% intervals, questions resampled."""
    figure = figures._figure(title, subtitle, x, y)
    form = ".1%" if percent else ".3g"
    for line, colour in zip(series, COLOURS, strict=False):
        xs, ys, low, high = (np.asarray(v, dtype=float) for v in line[1:])
        known = np.isfinite(low) & np.isfinite(high)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_scatter(
            x=np.concatenate([xs[known], xs[known][::-1]]),
            y=np.concatenate([high[known], low[known][::-1]]),
            fill="toself", fillcolor=f"rgba({red},{green},{blue},0.2)", mode="lines", line={"width": 0},
            legendgroup=line.name, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(
            x=xs, y=ys, mode="lines+markers", name=line.name, legendgroup=line.name,
            line={"color": colour, "width": 2}, marker={"size": 5},
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"{line.name}: %{{y:{form}}} [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]"
            "<extra></extra>",
        )  # fmt: skip
    if percent:
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def dots(title: str, subtitle: str, x: str, rows: Sequence[Dot], reference: float | None = None) -> go.Figure:
    """One dot per row with a bar for its 95% interval, questions resampled; first row on top."""
    figure = figures._figure(title, subtitle, x, "")
    for name, colour in zip(dict.fromkeys(row.series for row in rows), COLOURS, strict=False):
        own = [row for row in rows if row.series == name]
        estimate, low, high = (np.array([row[i] for row in own], dtype=float) for i in (2, 3, 4))
        bar = {
            "type": "data", "symmetric": False, "thickness": 1.5,
            "array": np.nan_to_num(high - estimate), "arrayminus": np.nan_to_num(estimate - low),
        }  # fmt: skip
        figure.add_scatter(
            x=estimate, y=[row.label for row in own], mode="markers", error_x=bar, name=name,
            marker={"size": 10, "color": colour}, customdata=np.stack([low, high], axis=1),
            hovertemplate="%{y}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra></extra>",
        )  # fmt: skip
    if reference is not None:
        figure.add_vline(x=reference, line={"color": figures.GREY, "dash": "dot"})
    labels = list(dict.fromkeys(row.label for row in rows))
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
    figure.update_layout(height=max(230, 150 + 34 * len(labels)))
    return figure
