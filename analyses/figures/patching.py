"""The figures of causal patching. Every figure names the depths and the number of questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sst_interp.analyses import plots
from sst_interp.analyses.plots import Dot, Line, dots, lines
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.patching import Patching

LAYER = "patched layer (0-based)"
SERIES = {
    "state": "the other depth's state",
    "random": "random, same size",
    "other": "another question's change, same size",
}
AXES = {
    "recovered": "recovered share of the logit difference (0: as the base, 1: as the donor)",
    "answer_changed": "share of answers that differ from the base's",
}


def by_layer(found: Patching) -> go.Figure:
    """Recovered share by patched layer, `back`, beside the controls of the same size."""
    title = "What one layer's state carries (depth 1's state into the deep pass)"
    if found.by_layer.empty:
        return plots.empty_figure(title, f"not testable: {found.not_testable}")
    rows = found.by_layer[found.by_layer["direction"] == "back"]
    drawn = []
    for what, name in SERIES.items():
        own = rows[rows["what"] == what].sort_values("last")
        if len(own):
            ends = own["recovered_low"], own["recovered_high"]
            drawn.append(Line(name, own["last"], own["recovered"], *ends))
    return lines(title, _subtitle(found), LAYER, "recovered share<br>of the logit difference", drawn)


def effect_map(found: Patching, direction: str) -> go.Figure:
    """Recovered share by position and layer."""
    title = f"Effect map, {direction}: recovered share by layer and position"
    values = found.effect_map.get(direction)
    if values is None or values.empty:
        return plots.empty_figure(title, f"not testable: {found.not_testable}")
    return plots.matrix(values, title, _subtitle(found), "recovered share", zmin=0, zmax=1)


def places(found: Patching, measure: str) -> go.Figure:
    """One measure of every place and control, all positions together."""
    title = "What follows a patch, by place"
    if found.effects.empty:
        return plots.empty_figure(title, f"not testable: {found.not_testable}")
    rows = found.table[found.table["what"] != "stranger"].dropna(subset=[measure])
    shown = [
        Dot(
            f"{row['place']}, {row['what']}", str(row["direction"]),
            row[measure], row[f"{measure}_low"], row[f"{measure}_high"],
        )
        for row in rows.to_dict("records")
    ]  # fmt: skip
    figure = dots(title, _subtitle(found), AXES[measure], shown, 0)
    return figure.update_layout(height=640)


def _subtitle(found: Patching) -> str:
    return f"{found.name}, depth 1 against depth {found.depth}; {questions_words(found.n_questions)}"
