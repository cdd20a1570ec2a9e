"""The figures of modes within layers, dwell, layer profile and shifts per question.

Every figure names the comparison, the pair of depths and the number of questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sst_interp.analyses import plots
from sst_interp.analyses.figures import overlap as figures
from sst_interp.analyses.plots import Line, lines
from sst_interp.analyses.statistics.bootstrap import questions_words
from sst_interp.analyses.statistics.modes import grid, to_v

if TYPE_CHECKING:
    from sst_interp.analyses.bimodality import Bimodality
    from sst_interp.analyses.dwell import Dwell
    from sst_interp.analyses.layer_profile import LayerProfile
    from sst_interp.analyses.shifts_per_question import ShiftsPerQuestion

LAYER = "layer (0-based)"


def bimodality_figures(found: Bimodality) -> dict[str, go.Figure]:
    """by_layer: where each layer's overlaps are. depth: how deep each layer's valley is."""
    if found.not_testable:
        words = f"not testable: {found.not_testable}"
        return {name: plots.empty_figure(found.comparison, words) for name in ("by_layer", "depth")}
    subtitle = f"{found.words}; {questions_words(found.n_questions)}"
    return {"by_layer": _spread_by_layer(found, subtitle), "depth": _depth_by_layer(found, subtitle)}


def _spread_by_layer(found: Bimodality, subtitle: str) -> go.Figure:
    figure = plots.canvas(
        "Overlaps of every layer",
        subtitle,
        f"overlap, {found.kind.replace('_', ' ')}<br>(axis logarithmic in 1 - overlap)",
        LAYER,
    )
    merged = 4
    counts = found.histograms.reshape(len(found.layers), -1, merged).sum(axis=-1)
    edges = grid(found.resolution)[::merged]
    used = np.flatnonzero(counts.any(axis=0))
    keep = slice(0, int(used[-1]) + 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure.add_heatmap(
        x=-(edges[1:] + edges[:-1])[keep] / 2,
        y=found.layers,
        z=shares[:, keep],
        zmin=0,
        colorscale="Cividis",
        colorbar={"title": {"text": "share of the layer's pairs per bin", "side": "right"}, "thickness": 14},
        hovertemplate="layer %{y}: %{z:.1%} of its pairs<extra></extra>",
    )
    rows = found.by_layer
    two = rows[(rows["modes"] == "two") & (rows["p_layers"] < 0.05)]
    if len(two):
        figure.add_scatter(
            x=-to_v(two["antimode"].to_numpy(), found.resolution), y=two["layer"], mode="markers",
            name="antimode of a layer with two modes", showlegend=True,
            marker={"color": plots.VERMILLION, "size": 8},
            customdata=two["antimode"], hovertemplate="layer %{y}: antimode %{customdata:.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        tickvals=-to_v(np.array(figures.TICKS), found.resolution),
        ticktext=[f"{t:g}" for t in figures.TICKS],
        tickangle=0,
        range=[-edges[used[-1] + 1], -edges[0]],
    )
    return figure


def _depth_by_layer(found: Bimodality, subtitle: str) -> go.Figure:
    rows = found.by_layer
    line = Line("antimode depth", rows["layer"], rows["depth"], rows["depth_low"], rows["depth_high"])
    figure = lines(
        "How deep the valley between two modes is, by layer",
        f"{subtitle}; 0: one hump, 1: nothing in between; 95% intervals",
        LAYER,
        "depth below the lower peak",
        [line],
        percent=True,
    )
    figure.update_yaxes(range=[-0.02, 1.02])
    return figure


def dwell_figures(found: Dwell) -> dict[str, go.Figure]:
    """lengths: stretches of each length, seen and shuffled. ratio_by_layer: mean length over chance."""
    if found.not_testable:
        words = f"not testable: {found.not_testable}"
        return {name: plots.empty_figure(found.comparison, words) for name in ("lengths", "ratio_by_layer")}
    subtitle = (
        f"{found.words}; {questions_words(found.n_questions)}; shifted: overlap below {found.threshold:.4g}"
    )
    figure = plots.canvas(
        "Stable stretches between two shifts",
        subtitle,
        "length (generated positions)",
        "complete stretches (log scale)",
    )
    for name, column, colour in (
        ("seen", "complete", plots.BLUE),
        ("positions shuffled", "complete_shuffled", plots.ORANGE),
    ):
        count = found.lengths[column].to_numpy(dtype=float)
        figure.add_scatter(
            x=found.lengths["length"], y=np.where(count >= 0.5, count, np.nan), mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2}, marker={"size": 5},
            hovertemplate=f"{name}: %{{y:,.0f}} of %{{x}} positions<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    layers = found.by_layer
    by_layer = lines(
        "Mean stable stretch over that of a shuffle, by layer",
        f"{subtitle}; 95% interval of each layer",
        LAYER,
        "ratio (1: chance)",
        [Line("ratio", layers["layer"], layers["ratio"], layers["low"], layers["high"])],
    )
    by_layer.add_hline(y=1, line={"color": plots.GREY, "dash": "dot"})
    return {"lengths": figure, "ratio_by_layer": by_layer}


def layer_profile(found: LayerProfile) -> go.Figure:
    """Shift rate by layer with the band for all layers at once, and the rate of the run."""
    if found.not_testable:
        return plots.empty_figure(found.comparison, f"not testable: {found.not_testable}")
    rows = found.profile
    figure = lines(
        "Shift rate by layer",
        f"{found.words}; {questions_words(found.n_questions)}; shifted: overlap below {found.threshold:.4g}; "
        "95% band for all layers at once",
        LAYER,
        "shifted share of pairs",
        [Line("shift rate", rows["layer"], rows["share"], rows["band_low"], rows["band_high"])],
        percent=True,
    )
    figure.add_hline(y=found.share.estimate, line={"color": plots.GREY, "dash": "dot"})
    return figure


def per_question(found: ShiftsPerQuestion) -> go.Figure:
    """The shifted share of every question, from least to most."""
    if found.not_testable:
        return plots.empty_figure(found.comparison, f"not testable: {found.not_testable}")
    rows = found.per_question.sort_values("share", kind="stable")
    figure = plots.canvas(
        "Shifts per question",
        f"{found.words}; {questions_words(found.n_questions)}; shifted: overlap below {found.threshold:.4g}",
        "questions, from least to most",
        "shifted share of its pairs",
    )
    figure.add_bar(
        x=np.arange(1, len(rows) + 1), y=rows["share"], marker={"color": plots.BLUE, "line": {"width": 0}},
        customdata=rows[["question", "pairs"]].to_numpy(),
        hovertemplate="question %{customdata[0]}: %{y:.1%} of %{customdata[1]:,} pairs<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
