"""The figures of what stands beside a shift: position 0, content, and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sst_interp.analyses import plots
from sst_interp.analyses.parts.noise_floor import KINDS
from sst_interp.analyses.plots import Dot, Line, dots, lines
from sst_interp.analyses.statistics.bootstrap import questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.bf16_noise import Bf16Noise
    from sst_interp.analyses.content import Content
    from sst_interp.analyses.position_zero import PositionZero

ENDS = ("", "_low", "_high")
LAYER = "layer (0-based)"


def position_zero(found: PositionZero) -> dict[str, go.Figure]:
    """by_position: questions and layers that shift, and the control at 0. layers: which ones, 0 and later."""
    if found.not_testable is not None:
        return _nothing(found.comparison, found.not_testable, ("by_position", "layers"))
    subtitle = f"{found.words}; {questions_words(found.n_questions)}; shifted: overlap below "
    subtitle += f"{found.threshold:.4g}"
    t = found.by_position
    series = [
        Line("questions with a shift in some layer", t["position"], t["share"], t["low"], t["high"]),
        Line("layers that shift", t["position"], *(t[f"layers{end}"] for end in ENDS)),
    ]
    if found.control is not None and found.control.not_testable is None:
        for name, c in (("questions", found.control.control), ("layers", found.control.control_layers)):
            series.append(Line(f"{name}, control at 0", [0], [c.estimate], [c.low], [c.high]))
    by_position = lines(
        "Position 0 and later", subtitle, "generated position (0 emits the first token)",
        "share of questions, share of layers", series, percent=True,
    )  # fmt: skip
    t = found.by_layer
    pairs = ("position 0", "zero"), ("later positions", "later")
    series = [Line(name, t["layer"], *(t[f"{c}{end}"] for end in ENDS)) for name, c in pairs]
    title, y = "Layers at position 0 and later", "shifted share of pairs"
    return {"by_position": by_position, "layers": lines(title, subtitle, LAYER, y, series, percent=True)}


def content(found: Content) -> dict[str, go.Figure]:
    """measures: each beside what the position alone gives. classes: shift rate by token class."""
    if found.not_testable is not None:
        return _nothing(found.comparison, found.not_testable, ("measures", "classes"))
    subtitle = f"{found.words}; {questions_words(found.n_questions)}"
    rows, alone = [], []
    for r in found.measures.dropna(subset=["estimate"]).to_dict("records"):
        label = f"{r['measure']}<br>{r['of']}"
        rows.append(Dot(label, "same question", r["estimate"], r["low"], r["high"]))
        if np.isfinite(r["by_position"]):
            alone.append(Dot(label, "other questions, same positions", r["by_position"], np.nan, np.nan))
    x = "share of variance (position, classes), mean rank correlation (others)"
    measures = dots("Position or content", subtitle, x, [*rows, *alone], reference=0)
    title = "Shift rate by token class"
    if found.classes.empty:
        reason = next((r for m, r in found.missing.items() if m.startswith("class")), "no tokens")
        return {"measures": measures, "classes": plots.empty_figure(title, f"not testable: {reason}")}
    each = [
        Dot(r["class"], f"token {r['role']}", r["share"], r["low"], r["high"])
        for r in found.classes.to_dict("records")
    ]
    classes = dots(title, subtitle, "shifted share of pairs", each)
    classes.update_xaxes(tickformat=".0%", rangemode="tozero")
    return {"measures": measures, "classes": classes}


def noise(found: Bf16Noise) -> dict[str, go.Figure]:
    """by_layer: the change in bf16 roundings. floors: the change beside measured noise, in relative L2."""
    if found.not_testable is not None:
        return _nothing(found.comparison, found.not_testable, ("by_layer", "floors"))
    t = found.by_layer
    ratio = lines(
        "Change over one bf16 rounding", f"{found.words}; {questions_words(found.n_questions)}", LAYER,
        "change, in bf16 roundings of the state (log scale)",
        [Line("median change", t["layer"], t["ratio"], t["low"], t["high"])],
    )  # fmt: skip
    ratio.add_hline(y=1, line={"color": plots.GREY, "dash": "dot"})
    ratio.update_yaxes(type="log")
    floors = [f for f in (found.floor(kind) for kind in KINDS) if f is not None]
    title = "Change and measured noise"
    if not floors:
        return {"by_layer": ratio, "floors": plots.empty_figure(title, f"not testable: {found.no_floor}")}
    series = [("between depths", "change", floors[0].by_layer)]
    series += [(f"noise: {KINDS[f.kind]}, depth {f.depth}", "noise", f.by_layer) for f in floors]
    drawn = [Line(name, t["layer"], *(t[f"{column}{end}"] for end in ENDS)) for name, column, t in series]
    n = questions_words(max(f.noise.n_questions for f in floors))
    floor = lines(title, f"{found.words}; {n}", LAYER, "median relative L2 (log scale)", drawn)
    floor.update_yaxes(type="log", exponentformat="power")
    return {"by_layer": ratio, "floors": floor}


def _nothing(comparison: str, reason: str, names: tuple[str, ...]) -> dict[str, go.Figure]:
    return {name: plots.empty_figure(comparison, f"not testable: {reason}") for name in names}
