"""How a training went: the loss of every step, that on held-out examples, and the stream's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import BLUE, GREY, ORANGE, TEMPLATE, VERMILLION
from sst_interp.analyses.result import Result
from sst_interp.errors import Untestable
from sst_interp.training.log import SMOOTHING, log_words, looks

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
    def table(self) -> pd.DataFrame:
        """A row per look at the held-out examples."""
        return looks(self.log)

    @property
    def verdict(self) -> str:
        """First and last losses, how fast it went, and the stream's weights."""
        return log_words(self.log, self.name)

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Training"

    def figure(self) -> go.Figure:
        """Loss above, the stream's own weights below, against the step."""
        steps, held_out = self.log.dropna(subset=["loss"]), self.table
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
            if column in held_out:
                figure.add_scatter(
                    x=held_out["step"], y=held_out[column], name=words, mode="lines+markers",
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
    """The curves of a training's log (`sst_interp.training.log.read_log`).

    Raises:
        Untestable: no step was taken.
    """
    rows = pd.DataFrame(log)
    if "loss" not in rows or rows["loss"].isna().all():
        raise Untestable("no step was taken")
    return TrainingCurves(rows, name)
