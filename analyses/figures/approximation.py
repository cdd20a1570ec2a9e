"""The figures of the approximation: errors by alpha, passes and position, and contraction."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, canvas, empty_figure
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.approximation import ApproximationError
    from sst_interp.analyses.approximation_contraction import Contraction

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
ERROR = "relative error of the logits (L2)"
PAPER = "the paper: alpha squared"


def by_alpha(result: ApproximationError, x: str = "alpha") -> go.Figure:
    """Two-pass error against alpha, or `L_alpha`, a line per model and set of layers, on log axes.

    The grey line is alpha squared, over the alphas shown, and the band the paper's range.
    """
    title = "Error of two passes"
    rows = result.schedules
    if rows.empty:
        return empty_figure(title, f"not testable: {result.not_testable}")
    rows = rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]
    unit = {"alpha": "alpha, mean over blended layers", "L_alpha": "L * alpha (blended layers times alpha)"}[
        x
    ]
    figure = canvas(title, _questions(rows), f"{unit} (log scale)", f"{ERROR}, log scale")
    from sst_interp.analyses.approximation import PAPER_ERROR

    figure.add_hrect(
        y0=PAPER_ERROR[0], y1=PAPER_ERROR[1], fillcolor=GREY, opacity=0.25, line_width=0,
        annotation_text="the paper's 6e-4 to 1.2e-3", annotation_position="bottom right",
    )  # fmt: skip
    if x == "alpha":
        line = np.geomspace(rows["alpha"].min(), rows["alpha"].max(), 20)
        figure.add_scatter(
            x=line,
            y=line**2,
            mode="lines",
            name=PAPER,
            line={"color": GREY, "dash": "dash"},
            hoverinfo="skip",
        )
    _series(figure, rows, x, "logit_error", {n: own for n, own in _named(rows, ["model", "layers"])})
    return _log(figure)


def by_passes(result: ApproximationError) -> go.Figure:
    """Error against the number of passes, a line per model and alpha, blended in all layers."""
    title = "Error by number of passes"
    rows = result.schedules
    if not rows.empty:
        rows = rows[(rows["groups"] == 1) & (rows["layers"] == "all")]
    if rows.empty:
        return empty_figure(title, f"not testable: {result.not_testable}")
    x = "passes over all positions (the first with the blend off)"
    figure = canvas(title, f"blend in all layers; {_questions(rows)}", x, f"{ERROR}, log scale")
    of_model = rows.groupby("model")["alpha"].nunique()
    named = {
        f"{model}, alpha {alpha:g}" if of_model[model] > 1 else f"{model}": own
        for (model, alpha), own in rows.groupby(["model", "alpha"])
    }
    _series(figure, rows, "passes", "logit_error", named)
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def by_groups(result: ApproximationError, model: str) -> go.Figure:
    """One model's error against the number of passes, a line per number of cyclic groups."""
    title = "Cyclic groups"
    rows = _headline(result, model)
    if rows.empty:
        return empty_figure(title, "not testable: no groups were measured")
    x = "passes over all positions (the first with the blend off)"
    words = (
        f"{model}, alpha {rows['alpha'].iloc[0]:.3g} in {rows['n_layers'].iloc[0]} layers; {_questions(rows)}"
    )
    figure = canvas(title, words, x, f"{ERROR}, log scale")
    named = {f"{g} group{'s' * (g > 1)}": own for g, own in rows.groupby("groups")}
    _series(figure, rows, "passes", "logit_error", named)
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def by_position(result: ApproximationError, model: str | None = None) -> go.Figure:
    """One model's error by position in the text, a line per number of sweeps."""
    title = "Error by position"
    if result.positions.empty or not result.headline:
        return empty_figure(title, f"not testable: {result.not_testable}")
    model = next(iter(result.headline)) if model is None else model
    rows = _headline(result, model, result.positions)
    words = (
        f"{model}, alpha {rows['alpha'].iloc[0]:.3g} in {rows['n_layers'].iloc[0]} layers; {_questions(rows)}"
    )
    x = "position in the text, first of its bin (0-based; log scale from 1)"
    figure = canvas(title, words, x, f"{ERROR}, log scale")
    rows = rows[rows["position"] > 0]
    named = {f"{k} sweep{'s' * (k > 1)}": own for k, own in rows.groupby("sweeps")}
    _series(figure, rows, "position", "logit_error", named)
    return _log(figure)


def contraction(result: Contraction) -> go.Figure:
    """Factor by which a sweep shrinks the error, against L * alpha."""
    title = "Contraction per sweep"
    rows = result.rates
    if rows.empty or rows["factor"].isna().all():
        return empty_figure(title, f"not testable: {result.not_testable or 'too few errors above rounding'}")
    rows = rows[rows["factor"].notna()]
    x = "L * alpha (blended layers times alpha, log scale)"
    figure = canvas(title, _questions(rows), x, "share of the error left by a sweep")
    named = {}
    for (model, groups), own in rows.groupby(["model", "groups"]):
        named[f"{model}, {groups} group{'s' * (groups > 1)}"] = own
    _series(figure, rows, "L_alpha", "factor", named, lines=False)
    figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(type="log")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _headline(result: ApproximationError, model: str, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    from sst_interp.analyses.approximation import headline_row

    rows = result.schedules if rows is None else rows
    row = headline_row(result.schedules, model) if len(rows) else None
    if row is None:
        return rows.iloc[:0]
    return rows[(rows["model"] == model) & (rows["layers"] == "all") & (rows["alpha"] == row["alpha"])]


def _named(rows: pd.DataFrame, by: list[str]) -> list[tuple[str, pd.DataFrame]]:
    words = lambda names: f"{names[0]}, {names[1]} layers"  # noqa: E731
    return [(words(names), own) for names, own in rows.groupby(by, sort=False)]


def _series(
    figure: go.Figure, rows: pd.DataFrame, x: str, y: str, named: dict[str, pd.DataFrame], lines: bool = True
) -> None:
    """A line with bars for the 95% intervals per entry; errors of exactly 0 have no place on a log axis."""
    for (name, own), colour, symbol in zip(named.items(), cycle(COLOURS), cycle(SYMBOLS), strict=False):
        own = own[own[y] > 0].sort_values(x)
        values, low, high = (own[c].to_numpy(dtype=float) for c in (y, f"{y}_low", f"{y}_high"))
        figure.add_scatter(
            x=own[x], y=values, mode="lines+markers" if lines and len(own) > 1 else "markers", name=name,
            line={"color": colour, "width": 2}, marker={"color": colour, "symbol": symbol, "size": 8},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": np.nan_to_num(high - values), "arrayminus": np.nan_to_num(values - low),
            },
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"{name}<br>%{{x:.3g}}: %{{y:.2g}} [%{{customdata[0]:.2g}}, %{{customdata[1]:.2g}}]"
            "<extra></extra>",
        )  # fmt: skip
    rows_of_legend = -(-len(named) // 2)
    figure.update_layout(margin={"t": 95 + 14 * rows_of_legend}, height=400 + 14 * rows_of_legend)


def _log(figure: go.Figure) -> go.Figure:
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def _questions(rows: pd.DataFrame) -> str:
    low, high = int(rows["questions"].min()), int(rows["questions"].max())
    words = questions_words(high) if low == high else f"{low} to {questions_words(high)}"
    return f"{words}; bars: 95%, questions resampled"
