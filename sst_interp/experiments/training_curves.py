"""How a training went: the loss of every step, that on held-out examples, and the stream's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import BLUE, GREY, ORANGE, TEMPLATE, VERMILLION, empty_figure
from sst_interp.analyses.result import Result

SMOOTHING = 20
"""Steps over which the line through the training loss is averaged."""
WEIGHTS = {
    "blend weight alpha": ("alpha_max", "alpha_mean", "alpha_min"),
    "residual scalar gamma": ("gamma_mean",),
}
"""What is drawn of the stream's own weights: axis -> columns of the log."""


@dataclass(frozen=True, eq=False)
class TrainingCurves(Result):
    """The log of one training."""

    log: pd.DataFrame
    """A row per step: step, loss, tokens, seconds, alpha_mean ... as `training.jsonl` has them."""
    name: str

    @property
    def looks(self) -> pd.DataFrame:
        """The rows in which held-out examples were measured."""
        columns = [
            c for c in self.log if c in ("step", "alpha_mean", "gamma_mean") or c.startswith("held_out")
        ]
        rows = self.log[columns]
        return rows[rows.filter(like="held_out").notna().any(axis=1)].reset_index(drop=True)

    @property
    def table(self) -> pd.DataFrame:
        """A row per look at the held-out examples."""
        return self.looks

    @property
    def verdict(self) -> str:
        """First and last losses, and how fast it went."""
        steps = self.log.dropna(subset=["loss"]) if "loss" in self.log else self.log.iloc[:0]
        if steps.empty:
            return "not testable: no step was taken."
        first, last = steps["loss"].head(SMOOTHING).mean(), steps["loss"].tail(SMOOTHING).mean()
        words = (
            f"{self.name}: training loss {first:.3f} -> {last:.3f} nats per answer token (means of the "
            f"first and last {min(SMOOTHING, len(steps))} of {len(steps)} steps), "
            f"{steps['tokens'].sum():,.0f} tokens at {steps['tokens'].sum() / steps['seconds'].sum():.0f}/s"
        )
        looks = self.looks
        if "held_out_exact" in looks and len(looks) > 1:
            exact = looks["held_out_exact"]
            words += f"; held out, exact evaluation: {exact.iloc[0]:.3f} -> {exact.iloc[-1]:.3f}"
        if "alpha_mean" in steps and steps["alpha_mean"].notna().any():
            end = steps.iloc[-1]
            words += (
                f"; alpha {steps['alpha_mean'].iloc[0]:.4f} -> {end['alpha_mean']:.4f} "
                f"(range {end['alpha_min']:.4f} to {end['alpha_max']:.4f})"
            )
        if "gamma_mean" in steps and steps["gamma_mean"].notna().any():
            gamma = steps["gamma_mean"]
            words += f"; gamma (mean over layers) {gamma.iloc[0]:.4f} -> {gamma.iloc[-1]:.4f}"
        return words + "."

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Training"

    def figure(self) -> go.Figure:
        """Loss above, the stream's own weights below, against the step."""
        if "loss" not in self.log:
            return empty_figure(self.title, "no step was taken")
        steps, looks = self.log.dropna(subset=["loss"]), self.looks
        stream = {
            axis: [c for c in names if c in steps and steps[c].notna().any()]
            for axis, names in WEIGHTS.items()
        }
        stream = {axis: names for axis, names in stream.items() if names}
        figure = make_subplots(rows=1 + len(stream), cols=1, shared_xaxes=True, vertical_spacing=0.08)
        figure.add_scatter(
            x=steps["step"], y=steps["loss"], mode="markers", name="one step", opacity=0.5,
            marker={"color": GREY, "size": 4}, row=1, col=1,
        )  # fmt: skip
        smooth = steps["loss"].rolling(SMOOTHING, min_periods=1).mean()
        figure.add_scatter(
            x=steps["step"], y=smooth, name=f"mean of {SMOOTHING} steps", line={"color": BLUE}, row=1, col=1
        )
        for column, words, color in (
            ("held_out_exact", "held out, exact", VERMILLION),
            ("held_out_as_trained", "held out, as trained", ORANGE),
        ):
            if column in looks:
                figure.add_scatter(
                    x=looks["step"], y=looks[column], name=words, mode="lines+markers",
                    line={"color": color}, row=1, col=1,
                )  # fmt: skip
        figure.update_yaxes(title_text="loss (nats per answer token)", type="log", dtick="D1", row=1, col=1)
        for row, (axis, names) in enumerate(stream.items(), 2):
            for column in names:
                figure.add_scatter(
                    x=steps["step"],
                    y=steps[column],
                    name=column.replace("_", " "),
                    line={"color": BLUE, "dash": "solid" if column.endswith("mean") else "dot"},
                    row=row,
                    col=1,
                )
            figure.update_yaxes(title_text=axis, row=row, col=1)
        figure.update_xaxes(title_text="step", row=1 + len(stream), col=1)
        figure.update_layout(template=TEMPLATE, title=f"Training {self.name}", height=380 + 240 * len(stream))
        return figure


def training_curves(log: Sequence[dict[str, Any]] | pd.DataFrame, name: str = "checkpoint") -> TrainingCurves:
    """The curves of a training's log (`sst_interp.training.read_log`)."""
    return TrainingCurves(pd.DataFrame(log), name)
