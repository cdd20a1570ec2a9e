"""The figures of what iteration does to outputs and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREY, ORANGE, VERMILLION, canvas, empty_figure
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.divergence import Divergence
    from sst_interp.analyses.token_replacement import TokenReplacement

SIDES = (("stable", "no layer shifted", BLUE), ("shifted", "a layer shifted", VERMILLION))


def replaced(found: TokenReplacement) -> go.Figure:
    """How many positions replace how many of the top 100 tokens, as shares of each kind."""
    title = "Tokens replaced in the top 100"
    if found.not_testable:
        return empty_figure(title, f"{found.words}: not testable: {found.not_testable}")
    figure = canvas(
        title, _subtitle(found), "tokens replaced, of the 100 most likely", "share of such positions"
    )
    for side, name, colour in SIDES:
        counts = found.histogram[side].to_numpy()
        if counts.sum():
            interval = getattr(found, side)
            figure.add_bar(
                x=found.histogram["replaced"], y=counts / counts.sum(), opacity=0.65,
                marker={"color": colour, "line": {"width": 0}},
                name=f"{name} ({counts.sum():,}; median {interval.estimate:.3g})",
                hovertemplate="%{x} replaced: %{y:.2%}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_yaxes(tickformat=".0%")
    return figure


def ranks(found: TokenReplacement) -> go.Figure:
    """Where the new winners came from."""
    title = "Rank the new most likely token came from"
    if found.not_testable or not found.n_winners:
        return empty_figure(
            title, f"{found.words}: " + (found.not_testable or "the most likely token never changes")
        )
    figure = canvas(
        title,
        _subtitle(found),
        f"rank at {'iteration' if found.comparison == 'within' else 'depth'} {found.a} (0-based)",
        "positions with a new winner",
    )
    ends = found.ranks[["rank", "to"]].astype(str)
    labels = [lo if lo == hi else f"{lo} to {hi}" for lo, hi in ends.itertuples(index=False)]
    labels[-1] = f"{ends['rank'].iloc[-1]} or more"
    for side, name, colour in SIDES:
        figure.add_bar(
            x=labels, y=found.ranks[side], name=name, marker={"color": colour},
            hovertemplate="rank %{x}: %{y:,} positions<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    return figure


def replaced_by_layer(found: TokenReplacement) -> go.Figure:
    """Median tokens replaced by layer, where that layer shifted and where it did not."""
    title = "Tokens replaced by layer, read with the logit lens"
    if found.by_layer.empty:
        return empty_figure(title, f"{found.words}: not testable: {found.not_testable or found.no_layers}")
    figure = canvas(title, _subtitle(found), "layer (0-based)", "tokens replaced of 100, median")
    for side, _, colour in SIDES:
        name = f"that layer {'shifted' if side == 'shifted' else 'did not'}"
        add_line(figure, found.by_layer["layer"], found.by_layer, side, name, colour)
    figure.update_yaxes(rangemode="tozero")
    return figure


def parted(found: Divergence) -> go.Figure:
    """Share of questions whose texts have parted, by position."""
    title = "Where the texts of two depths part"
    if found.not_testable:
        return empty_figure(title, f"free: not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"{found.words}; {questions_words(found.n_questions)}",
        "generated position (0 emits the first token)",
        "share of questions parted",
    )
    add_line(figure, found.by_position["position"], found.by_position, "parted", "parted", BLUE)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def shifts_around(found: Divergence) -> go.Figure:
    """Shift rate before, at and after the first differing token, in `free` and on one text."""
    title = "Shifts and the first differing token"
    if found.not_testable:
        return empty_figure(title, f"free: not testable: {found.not_testable}")
    figure = canvas(
        title,
        f"{found.words}; {questions_words(found.n_questions)}; shifted: overlap below {found.threshold:.4g}",
        "position, relative to the first differing token",
        "shifted share of pairs",
    )
    for column, name, colour in (
        ("rate", "free: each its own text", VERMILLION),
        ("rate_replayed", "replayed: the same positions on one text", BLUE),
    ):
        values = found.shifts[column].to_numpy(dtype=float)
        low, high = (found.shifts[f"{column}_{end}"].to_numpy() for end in ("low", "high"))
        figure.add_bar(
            x=found.shifts["when"], y=values, name=name, marker={"color": colour},
            error_y=bars(values, low, high, GREY), hovertemplate="%{x}: %{y:.1%}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def predictors(found: Divergence) -> go.Figure:
    """How well each score says where the texts part."""
    title = "Can it be told where the texts part?"
    known = found.predictors.dropna(subset="within") if len(found.predictors) else found.predictors
    if found.not_testable or known.empty:
        why = found.not_testable or found.no_replay or "too few questions part after position 0"
        return empty_figure(title, f"{found.words}: not testable: {why}")
    figure = canvas(
        title,
        f"{found.words}; {known['questions'].max():.0f} questions that part after position 0",
        "AUC (one half is chance)",
        "",
    )
    for column, name, colour in (
        ("within", "within a question", BLUE),
        ("across", "between questions at one position", ORANGE),
    ):
        values, low, high = (known[f"{column}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
        figure.add_scatter(
            x=values, y=known["score"], mode="markers", name=name, marker={"size": 10, "color": colour},
            error_x=bars(values, low, high, colour), hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0.5, line={"color": GREY, "dash": "dot"})
    figure.update_yaxes(autorange="reversed")
    return figure


def add_line(
    figure: go.Figure, x: pd.Series, table: pd.DataFrame, column: str, name: str, colour: str
) -> None:
    """A line with the intervals `column`_low and `column`_high as bars."""
    values = table[column].to_numpy(dtype=float)
    figure.add_scatter(
        x=x, y=values, mode="lines+markers", name=name, line={"color": colour}, marker={"size": 7},
        error_y=bars(values, table[f"{column}_low"].to_numpy(), table[f"{column}_high"].to_numpy(), colour),
        hovertemplate="%{x}: %{y:.3g}<extra>" + name + "</extra>",
    )  # fmt: skip


def bars(values: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> dict[str, object]:
    """Error bars from the ends of intervals; none where an end is NaN."""
    up, down = (np.nan_to_num(np.asarray(d, dtype=float)) for d in (high - values, values - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "width": 4}


def _subtitle(found: TokenReplacement) -> str:
    n = f"{questions_words(found.n_questions)}, {found.n_positions:,} positions"
    return f"{found.words}; {n}; shifted: overlap below {found.threshold:.4g}"
