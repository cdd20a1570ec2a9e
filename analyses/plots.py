"""What all figures are drawn with: one template, lines with bands, dots with bars, matrices.

Colours are Okabe and Ito's (categories) and cividis (magnitudes), which stay apart for colour-blind readers.
Text is a mid grey that reads on white and on black; the report recolours it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

BLUE, ORANGE, VERMILLION, GREEN, SKY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9"
GREY = "#808080"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_AXIS = {
    "gridcolor": "rgba(128,128,128,0.25)",
    "zeroline": False,
    "linecolor": GREY,
    "ticks": "outside",
    "automargin": True,
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": GREY},
        "title": {"font": {"size": 15}, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 10}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [BLUE, ORANGE, GREEN, VERMILLION, SKY],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 60, "r": 20, "t": 95, "b": 55},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0},
        "height": 380,
    }
)


def canvas(title: str, subtitle: str, x: str, y: str) -> go.Figure:
    """A figure with nothing on it yet: its title, what was compared, and its axes."""
    figure = go.Figure()
    figure.update_layout(template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def empty_figure(title: str, words: str) -> go.Figure:
    """A figure that says why there is nothing to show."""
    figure = canvas(title, words, "", "")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(text=words, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure


def matrix(values: pd.DataFrame, title: str, subtitle: str, bar: str, **heatmap: object) -> go.Figure:
    """Positions across, layers up: a frame with positions down and layers across, as colours."""
    values = values if values.columns.name == "position" else values.T
    figure = canvas(title, subtitle, "generated position", "layer (0-based)")
    figure.add_heatmap(
        x=values.columns.to_numpy(),
        y=values.index.to_numpy(),
        z=values.to_numpy(),
        colorbar={"title": {"text": bar, "side": "right"}, "thickness": 14},
        hovertemplate="position %{x}, layer %{y}: %{z:.3g}<extra></extra>",
        **({"colorscale": "Cividis"} | heatmap),
    )
    return figure


COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY)


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
    figure = canvas(title, subtitle, x, y)
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
    figure = canvas(title, subtitle, x, "")
    for name, colour in zip(dict.fromkeys(row.series for row in rows), COLOURS, strict=False):
        own = [row for row in rows if row.series == name]
        estimate, low, high = (np.array([row[i] for row in own], dtype=float) for i in (2, 3, 4))
        figure.add_scatter(
            x=estimate, y=[row.label for row in own], mode="markers", name=name,
            error_x=error_bars(estimate, low, high, colour),
            marker={"size": 10, "color": colour}, customdata=np.stack([low, high], axis=1),
            hovertemplate="%{y}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra></extra>",
        )  # fmt: skip
    if reference is not None:
        figure.add_vline(x=reference, line={"color": GREY, "dash": "dot"})
    labels = list(dict.fromkeys(row.label for row in rows))
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
    figure.update_layout(height=max(230, 150 + 34 * len(labels)))
    return figure


def add_line(
    figure: go.Figure, x: pd.Series, table: pd.DataFrame, column: str, name: str, colour: str
) -> None:
    """A line with the intervals `column`_low and `column`_high as bars."""
    values = table[column].to_numpy(dtype=float)
    low, high = (table[f"{column}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    figure.add_scatter(
        x=x, y=values, mode="lines+markers", name=name, line={"color": colour}, marker={"size": 7},
        error_y=error_bars(values, low, high, colour),
        hovertemplate="%{x}: %{y:.3g}<extra>" + name + "</extra>",
    )  # fmt: skip


def error_bars(values: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> dict[str, object]:
    """Error bars from the ends of intervals; none where an end is NaN."""
    up, down = (np.nan_to_num(np.asarray(d, dtype=float)) for d in (high - values, values - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "width": 4}
