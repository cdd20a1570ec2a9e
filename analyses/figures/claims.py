"""The figures of the claims ledger: verdicts at a glance, and this run's figures over the paper's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sst_interp.analyses import plots
from sst_interp.analyses import plots as interval_figures
from sst_interp.analyses.ledger.rules import EVERYWHERE, FAILS, HOLDS, UNTESTED, Row
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.ledger.claims import Ledger

COLOURS = {HOLDS: plots.BLUE, FAILS: plots.VERMILLION, UNTESTED: plots.GREY}
SYMBOLS = {HOLDS: "circle", FAILS: "x", UNTESTED: "circle-open"}
"""Verdicts differ in shape as well as in colour."""


def verdicts(ledger: Ledger) -> go.Figure:
    """Claims down, comparisons across; colour and shape say the verdict, hovering the figures."""
    subtitle = (
        f"{ledger.name}; {questions_words(ledger.n_questions)}; overlap: {ledger.kind.replace('_', ' ')}"
    )
    if not ledger.rows:
        return plots.empty_figure("Verdicts", "no claims")
    figure = plots.canvas("Verdict by claim and comparison", subtitle, "comparison", "claim of the paper")
    for state, colour in COLOURS.items():
        own = [row for row in ledger.rows if row.state == state]
        if not own:
            continue
        figure.add_scatter(
            x=[_column(row) for row in own],
            y=[_label(row) for row in own],
            mode="markers",
            name=f"{state} ({len(own)})",
            marker={
                "size": 15, "color": colour, "symbol": SYMBOLS[state],
                "line": {"width": 2, "color": colour},
            },
            customdata=[[r.claim.paper, _plain(r.finding.here), _plain(r.finding.verdict)] for r in own],
            hovertemplate="%{y}<br>paper: %{customdata[0]}<br>this run: %{customdata[1]}"
            "<br>%{customdata[2]}<extra></extra>",
        )  # fmt: skip
    labels = list(dict.fromkeys(_label(row) for row in ledger.rows))
    columns = list(dict.fromkeys(_column(row) for row in ledger.rows))
    figure.update_xaxes(categoryorder="array", categoryarray=columns)
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
    figure.update_layout(height=170 + 32 * len(labels))
    return figure


def beside_paper(ledger: Ledger) -> go.Figure:
    """Figures of this run over the paper's, where both are a number above 0; 1 is the paper's."""
    dots = []
    for row in ledger.rows:
        value, found = row.claim.value, row.finding.figure
        if not (math.isfinite(value) and found.estimate > 0):
            continue
        # An end at or below 0 has no place on a logarithmic axis: its side of the bar is left out.
        low = found.low / value if found.low > 0 else math.nan
        label = row.claim.id + asked(ledger, row.claim.id)
        dots.append(
            interval_figures.Dot(label, _column(row), found.estimate / value, low, found.high / value)
        )
    title, n = "This run's figures beside the paper's", questions_words(ledger.n_questions)
    if not dots:
        return plots.empty_figure(title, "no claim has a number to set beside the paper's")
    figure = interval_figures.dots(
        title, f"{ledger.name}; {n}; bars: 95%, questions resampled; n: questions of that figure",
        "this run / paper (log scale, no unit)", dots, reference=1,
    )  # fmt: skip
    ends = np.array([[d.estimate, d.low, d.high, 1.0] for d in dots])
    span = np.log10([0.8 * np.nanmin(ends), 1.25 * np.nanmax(ends)])
    figure.update_xaxes(type="log", range=span.tolist())
    figure.update_yaxes(title_text="claim")
    return figure


def asked(ledger: Ledger, claim: str) -> str:
    """` (n = 18 to 24)`: the questions that a claim's figures rest on, over its comparisons."""
    numbers = {row.finding.figure.n_questions for row in ledger.rows if row.claim.id == claim} - {0}
    return f" (n = {' to '.join(dict.fromkeys(map(str, (min(numbers), max(numbers)))))})" if numbers else ""


def _column(row: Row) -> str:
    return "whole run" if row.comparison == EVERYWHERE else row.comparison


def _label(row: Row) -> str:
    words = row.claim.words
    return f"{row.claim.id}: {words if len(words) < 52 else words[:49].rsplit(' ', 1)[0] + ' ...'}"


def _plain(words: str) -> str:
    """Text for a hover label, which reads angle brackets as tags."""
    return words.replace("&", "&amp;").replace("<", "&lt;")
