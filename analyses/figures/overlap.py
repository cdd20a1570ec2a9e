"""The figures of overlap and basin shifts: one template, one look.

Colours are Okabe and Ito's (categories) and cividis (magnitudes), which stay apart for every common form
of colour blindness. Backgrounds are transparent and text is a mid grey that reads on white and on black;
the report recolours text for the page it is on. Every figure names the comparison, the pair of depths
and the number of questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, canvas, empty_figure, matrix
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.basin_shifts import BasinShifts
    from sst_interp.analyses.overlap import OverlapDistribution

PAPER = 0.99
TICKS = (1, 0.997, 0.99, 0.97, 0.9, 0.5, 0, -1)
"""Overlaps that get a tick on the axis in log(1 - overlap + resolution)."""


def overlap_histogram(found: OverlapDistribution, threshold: float | None = None) -> go.Figure:
    """Share of pairs by overlap: log counts, on an axis logarithmic in 1 - overlap, 1 on the right.

    Shows the antimode with its interval (or `threshold`, where one was fixed) and the paper's 0.99.
    """
    from sst_interp.analyses.overlap import pair_words
    from sst_interp.analyses.statistics.modes import to_overlap, to_v

    merged = 4
    counts = found.histograms.sum(axis=0).reshape(-1, merged).sum(axis=1)
    edges = found.edges[::merged]
    left, right = (to_overlap(e, found.resolution) for e in (edges[1:], edges[:-1]))
    figure = canvas(
        "Distribution of overlaps",
        f"{pair_words(found.comparison, found.a, found.b)}; {questions_words(found.n_questions)}, "
        f"{found.n_pairs:,} pairs",
        f"overlap, {found.kind.replace('_', ' ')}<br>(axis logarithmic in 1 - overlap)",
        "share of pairs per bin (log scale)",
    )
    figure.add_bar(
        x=-(edges[1:] + edges[:-1]) / 2,
        y=np.where(counts > 0, counts / counts.sum(), np.nan),
        width=np.diff(edges),
        marker={"color": BLUE, "line": {"width": 0}},
        customdata=np.stack([left, right, counts], axis=1),
        hovertemplate="overlap %{customdata[0]:.5f} to %{customdata[1]:.5f}<br>%{y:.3%} of pairs "
        "(%{customdata[2]:,})<extra></extra>",
        showlegend=False,
    )
    lowest = 0.6 / counts.sum()
    highest = 1.5 * counts.max() / counts.sum()

    def line(at: float, name: str, colour: str, dash: str) -> None:
        v = -float(to_v(np.array(at), found.resolution))
        figure.add_scatter(
            x=[v, v], y=[lowest, highest], mode="lines", name=name, hoverinfo="skip",
            line={"color": colour, "dash": dash, "width": 2},
        )  # fmt: skip

    antimode = found.modes.antimode
    if antimode is not None:
        ends = [-float(to_v(np.array(e), found.resolution)) for e in (antimode.low, antimode.high)]
        figure.add_vrect(x0=ends[0], x1=ends[1], fillcolor=VERMILLION, opacity=0.2, line_width=0)
        line(antimode.estimate, f"antimode {antimode.text()}", VERMILLION, "solid")
    if threshold is not None and threshold != PAPER and (antimode is None or threshold != antimode.estimate):
        line(threshold, f"threshold {threshold:.4g}", GREEN, "solid")
    line(PAPER, f"the paper's {PAPER}", ORANGE, "dash")
    used = np.flatnonzero(counts)
    span = [min(-edges[used[-1] + 1], -float(to_v(np.array(0.95), found.resolution))), -edges[0]]
    pad = 0.02 * (span[1] - span[0])
    figure.update_xaxes(
        tickvals=[-float(to_v(np.array(t), found.resolution)) for t in TICKS],
        ticktext=[f"{t:g}" for t in TICKS],
        tickangle=0,
        range=[span[0] - pad, span[1] + pad],
    )
    figure.update_yaxes(type="log", range=np.log10([lowest, highest]), exponentformat="power", dtick=1)
    return figure


def rate_line(table: pd.DataFrame, by: str, subtitle: str) -> go.Figure:
    """Shift rate by `position` or `layer`, with its interval as a band (`BasinShifts.by_position`)."""
    unit = {"position": "generated position (0 emits the first token)", "layer": "layer (0-based)"}[by]
    figure = canvas(f"Shift rate by {by}", subtitle, unit, "shifted share of pairs")
    x = table[by].to_numpy()
    known = np.isfinite(table["low"].to_numpy(dtype=float))
    band = np.concatenate([x[known], x[known][::-1]])
    ends = np.concatenate([table["high"].to_numpy()[known], table["low"].to_numpy()[known][::-1]])
    figure.add_scatter(
        x=band, y=ends, fill="toself", mode="lines", line={"width": 0}, fillcolor="rgba(0,114,178,0.25)",
        name="95% interval, questions resampled", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=x,
        y=table["share"],
        mode="lines+markers",
        name="shift rate",
        line={"color": BLUE, "width": 2},
        marker={"size": 5},
        customdata=table[["low", "high", "pairs", "questions"]].to_numpy(),
        hovertemplate=f"{by} %{{x}}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]"
        "<br>%{customdata[2]:,} pairs, %{customdata[3]} questions<extra></extra>",
    )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def question_figure(values: pd.DataFrame, quantity: str, subtitle: str) -> go.Figure:
    """One question's `overlap` or `norm ratio` by position and layer (from `question_map`)."""
    if quantity == "overlap":
        return matrix(values, "Overlap of one question", subtitle, "overlap", zmax=1)
    return matrix(
        values.map(np.log2), "Norm ratio of one question", subtitle, "log2 of norm b / norm a",
        zmid=0, colorscale="RdBu",
    )  # fmt: skip


def norm_ratios(result: BasinShifts, subtitle: str) -> go.Figure:
    """Median norm ratio at stable and at shifted pairs, with intervals."""
    figure = canvas("Size of the state", subtitle, "median of norm b / norm a (log scale)", "")
    for name, interval, colour in (
        ("stable", result.norm_ratio_stable, BLUE),
        ("shifted", result.norm_ratio_shifted, VERMILLION),
    ):
        bar = None
        if interval.known:
            high, low = interval.high - interval.estimate, interval.estimate - interval.low
            bar = {"type": "data", "symmetric": False, "array": [high], "arrayminus": [low]}
        figure.add_scatter(
            x=[interval.estimate], y=[name], mode="markers", error_x=bar, name=name, showlegend=False,
            marker={"size": 11, "color": colour}, hovertemplate=f"{name}: {interval.text()}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=1, line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(type="log")
    figure.update_layout(height=230)
    return figure


def basin_shift_figures(result: BasinShifts) -> dict[str, go.Figure]:
    """Every figure of one comparison by name."""
    names = ("overlap", "by_position", "by_layer", "rates", "norm_ratio")
    if result.distribution is None:
        return {
            name: empty_figure(result.comparison, f"not testable: {result.not_testable}") for name in names
        }
    n = questions_words(result.n_questions)
    subtitle = f"{result.words}; {n}; shifted: overlap below {result.threshold:.4g}"
    return {
        "overlap": overlap_histogram(result.distribution, result.threshold),
        "by_position": rate_line(result.by_position, "position", subtitle),
        "by_layer": rate_line(result.by_layer, "layer", subtitle),
        "rates": matrix(
            result.rates,
            "Shift rate by position and layer",
            subtitle,
            "share of questions",
            zmin=0,
            zmax=max(0.05, float(np.nanmax(result.rates.to_numpy()))),
        ),
        "norm_ratio": norm_ratios(result, subtitle),
    }
