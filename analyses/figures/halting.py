"""The figures of the halting probe. Always-positive and never-positive are in every one they can be in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sst_interp.analyses.figures.outputs import bars
from sst_interp.analyses.parts.plain_probes import constants
from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, Dot, canvas, dots, empty_figure
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.halting import Halting

NAMES = ("auc", "decisions", "permutation", "calibration", "dims")


def figures_of(found: Halting) -> dict[str, go.Figure]:
    """Every figure by name."""
    if found.not_testable:
        return {name: empty_figure(found.title, f"not testable: {found.not_testable}") for name in NAMES}
    subtitle = f"{found.label}: {found.n_positive} of {questions_words(found.n_questions)} positive; "
    subtitle += "leave-one-out"
    return {
        "auc": _auc(found, subtitle),
        "decisions": _decisions(found, subtitle),
        "permutation": _permutation(found, subtitle),
        "calibration": _calibration(found, subtitle),
        "dims": _dims(found, subtitle),
    }


def _auc(found: Halting, subtitle: str) -> go.Figure:
    rows = []
    for place, row in enumerate(found.comparison.to_dict("records")):
        constant = row["name"] in constants(found.action)
        series = "no probe" if constant else "the probe" if place == 0 else "plain alternative"
        rows.append(Dot(row["name"], series, row["auc"], row["auc_low"], row["auc_high"]))
    for name, area in (
        ("leave-pair-out", found.pair_auc),
        ("stratified folds", found.fold_auc),
        ("pooled, not rebalanced (biased)", found.pooled_auc),
        ("selection outside the fold (wrong)", found.leaky_auc),
    ):
        rows.append(Dot(name, "the same probe, otherwise validated", area.estimate, area.low, area.high))
    return dots("Area under the curve", subtitle, "AUC (one half is chance)", rows, reference=0.5)


def _decisions(found: Halting, subtitle: str) -> go.Figure:
    """The curve of the probe, and what each alternative does at its own threshold."""
    figure = canvas(
        "What it finds and what it lets go",
        subtitle,
        "1 - specificity: negative questions called positive (share)",
        "sensitivity: positive questions called positive (share)",
    )
    order = np.argsort(-found.scores["score"].to_numpy(), kind="stable")
    positive = found.scores["positive"].to_numpy(dtype=bool)[order]
    up, along = (np.concatenate([[0], np.cumsum(side) / side.sum()]) for side in (positive, ~positive))
    figure.add_scatter(
        x=along, y=up, mode="lines", name="the probe, every threshold",
        line={"color": BLUE, "width": 2, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="chance", line={"color": GREY, "dash": "dot"}, hoverinfo="skip"
    )
    table = found.comparison
    for rows, name, colour, symbol in (
        (table.iloc[:1], "the probe's decisions", BLUE, "circle"),
        (table.iloc[1:-2], "plain alternatives", ORANGE, "diamond"),
        (table.iloc[-2:], " and ".join(constants(found.action)), VERMILLION, "square"),
    ):
        x, y = 1 - rows["specificity"].to_numpy(), rows["sensitivity"].to_numpy()
        low, high = 1 - rows["specificity_high"].to_numpy(), 1 - rows["specificity_low"].to_numpy()
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, text=rows["name"],
            marker={"color": colour, "size": 10, "symbol": symbol},
            error_x=bars(x, low, high, colour),
            error_y=bars(y, rows["sensitivity_low"].to_numpy(), rows["sensitivity_high"].to_numpy(), colour),
            hovertemplate="%{text}: sensitivity %{y:.1%}, 1 - specificity %{x:.1%}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_layout(height=480)
    return figure


def _permutation(found: Halting, subtitle: str) -> go.Figure:
    title = "Permuted labels, put through everything"
    if not found.permutations:
        return empty_figure(title, "not testable: no permutations were made")
    words = f"{subtitle}; {found.permutations:,} permutations, p = {found.p_auc:.2g}"
    figure = canvas(title, words, "AUC, leave-one-out rebalanced", "permutations")
    figure.add_histogram(
        x=found.null["auc"], xbins={"start": 0, "end": 1, "size": 0.025}, name="permuted labels",
        marker={"color": GREY, "line": {"width": 0}},
        hovertemplate="AUC %{x}: %{y} permutations<extra></extra>",
    )  # fmt: skip
    lines = [(found.auc.estimate, "the real labels", BLUE)]
    lines += [(found.leaky_auc.estimate, "real labels, selection outside the fold", VERMILLION)]
    lines += [(0.5, " and ".join(constants(found.action)), GREEN)]
    for value, name, colour in lines:
        figure.add_vline(x=value, line={"color": colour, "width": 2})
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=f"{name} {value:.2f}", line={"color": colour, "width": 2}
        )
    figure.update_xaxes(range=[0, 1])
    return figure


def _calibration(found: Halting, subtitle: str) -> go.Figure:
    figure = canvas(
        "Predicted and observed", subtitle, "predicted probability of positive", "share positive (observed)"
    )
    t = found.calibration
    observed = t["observed"].to_numpy()
    figure.add_scatter(
        x=t["predicted"], y=observed, mode="markers+lines", name="the probe", customdata=t["questions"],
        error_y=bars(observed, t["observed_low"].to_numpy(), t["observed_high"].to_numpy(), BLUE),
        line={"color": BLUE}, marker={"size": 9},
        hovertemplate="predicted %{x:.2f}: %{y:.1%} of %{customdata} questions<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        name="perfect",
        line={"color": GREY, "dash": "dot"},
        hoverinfo="skip",
    )
    rate = found.n_positive / found.n_questions
    figure.add_scatter(
        x=[1, 0], y=[rate, rate], mode="markers", name=" and ".join(constants(found.action)),
        text=list(constants(found.action)),
        marker={"color": VERMILLION, "size": 10, "symbol": "square"},
        hovertemplate="%{text}: %{y:.1%} observed<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_xaxes(range=[-0.03, 1.03])
    return figure


def _dims(found: Halting, subtitle: str) -> go.Figure:
    title, dims = "Dimensions the probes read", found.dims
    if dims is None or dims.table.empty:
        return empty_figure(title, "the probes read no dimension")
    words = f"{subtitle}; {dims.count:.0f} per probe"
    if math.isfinite(dims.stability):
        words += f"; stability {dims.stability:.2f}"
        if found.fold_dims is not None and math.isfinite(found.fold_dims.stability):
            words += f", between folds {found.fold_dims.stability:.2f}"
    figure = canvas(title, words, "dimension (0-based)", "share of probes that read it")
    for (layer, rows), colour in zip(
        sorted(dims.table.groupby("layer"), key=lambda g: -len(g[1])), (BLUE, ORANGE, GREEN), strict=False
    ):
        figure.add_bar(
            x=rows["dim"], y=rows["share"], name=f"layer {layer}", marker={"color": colour},
            width=max(1.0, dims.table["dim"].max() / 400),
            hovertemplate=f"layer {layer}, dimension %{{x}}: %{{y:.0%}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    figure.update_layout(barmode="overlay")
    return figure
