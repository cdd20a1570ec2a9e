"""How true are the gradients of few sweeps? Each against exact back-propagation through time.

`sst_interp.approximation.study` computes them at the same weights and on the same batch, along the two-pass
training of a small model. The unit is a seed (a start and its data): within one, steps are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.figures.approximation import COLOURS
from sst_interp.analyses.plots import GREY, TEMPLATE, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.seeds import over_seeds, seeds_words

SETTING = ["alpha_low", "alpha_high"]
PARTS = {"weights": "weights", "alpha": "alpha (its logit)"}


def bounds_words(low: float, high: float) -> str:
    """How a setting is called."""
    return f"alpha in [{low:g}, {high:g}]"


@dataclass(frozen=True, eq=False)
class GradientFidelity(Result):
    """Gradients of few sweeps against exact ones. Intervals are over seeds; settings are not pooled."""

    summary: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per setting, arm and part: seeds, steps, and over them `cosine` and `norm_ratio` (mean of each
    seed's mean over the training) with `_low` and `_high`, and `lowest_cosine` of any step and seed."""
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per setting, arm, part and step: means over seeds of `cosine` and `norm_ratio`, and their lowest
    and highest seed."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Gradients against exact back-propagation"

    @property
    def table(self) -> pd.DataFrame:
        """A row per setting, arm and part."""
        return self.summary

    @property
    def verdict(self) -> str:
        """The two-pass gradient, setting by setting, and the arm that comes nearest to exact."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        sentences = []
        for (low, high), rows in self.summary.groupby(SETTING):
            said = []
            for part, words in PARTS.items():
                own = rows[rows["part"] == part].set_index("arm")
                if "two-pass" not in own.index:
                    continue
                two = own.loc["two-pass"]
                said.append(
                    f"{words}: cosine {two['cosine']:.3f} (lowest {two['lowest_cosine']:.3f}), norm "
                    f"{two['norm_ratio']:.2f} times the exact one's"
                )
                best = own["cosine"].idxmax()
                if best != "two-pass":
                    said[-1] += f" (nearest: {best}, cosine {own.loc[best, 'cosine']:.3f})"
            if said:
                n = seeds_words(int(rows["seeds"].max()))
                sentences.append(
                    f"{bounds_words(low, high)}, {n}: the two-pass gradient of the " + "; of ".join(said)
                )
        return ". ".join(sentences) + "." if sentences else "not testable: no two-pass gradient was measured."

    def figure(self) -> go.Figure:
        """Cosine (above) and norm ratio (below) over the training, in the widest setting."""
        if self.curves.empty:
            return empty_figure(self.title, f"not testable: {self.not_testable}")
        low, high = max(self.curves.groupby(SETTING).groups, key=lambda ends: ends[1])
        return self._setting(float(low), float(high))

    def figures(self) -> dict[str, go.Figure]:
        """A figure per setting."""
        if self.curves.empty:
            return {"figure": self.figure()}
        settings = self.curves.groupby(SETTING).groups
        return {bounds_words(low, high): self._setting(low, high) for low, high in settings}

    def _setting(self, low: float, high: float) -> go.Figure:
        rows = self.curves[(self.curves["alpha_low"] == low) & (self.curves["alpha_high"] == high)]
        parts = [part for part in PARTS if part in set(rows["part"])]
        figure = make_subplots(
            rows=2, cols=len(parts), shared_xaxes=True, vertical_spacing=0.08, horizontal_spacing=0.12,
            column_titles=[PARTS[part] for part in parts],
        )  # fmt: skip
        for column, part in enumerate(parts, 1):
            arms = rows[rows["part"] == part].groupby("arm", sort=False)
            for (arm, own), colour in zip(arms, COLOURS, strict=False):
                for row, name in enumerate(("cosine", "norm_ratio"), 1):
                    spread = own[[f"{name}_lowest", f"{name}_highest"]].to_numpy()
                    figure.add_scatter(
                        x=own["step"], y=own[name], name=arm, legendgroup=arm, line={"color": colour},
                        mode="lines+markers", marker={"size": 4}, showlegend=row == 1 and column == 1,
                        customdata=spread, row=row, col=column,
                        hovertemplate=f"{arm}, step %{{x}}: %{{y:.3f}} [%{{customdata[0]:.3f}} to "
                        "%{customdata[1]:.3f} over seeds]<extra></extra>",
                    )  # fmt: skip
            figure.update_yaxes(title_text="cosine with exact", row=1, col=column)
            figure.update_yaxes(title_text="norm / exact norm", row=2, col=column)
            figure.add_hline(y=1, line={"color": GREY, "dash": "dot"}, row=2, col=column)  # pyright: ignore
            figure.update_xaxes(title_text="step of the two-pass training", row=2, col=column)
        n = int(self.summary[self.summary["alpha_high"] == high]["seeds"].max())
        subtitle = f"{bounds_words(low, high)}; mean of {seeds_words(n)}"
        figure.update_layout(
            template=TEMPLATE, height=560, margin={"t": 130},
            title={"text": self.title, "subtitle": {"text": subtitle}}, legend={"y": 1.06},
        )  # fmt: skip
        return figure


def gradient_fidelity(gradients: pd.DataFrame) -> GradientFidelity:
    """Cosines and norm ratios of approximate gradients.

    Args:
        gradients: the table `gradients` of a study: alpha_low, alpha_high, seed, step, arm, part, cosine,
            norm_ratio. Rows that are not finite are left out.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such row.
    """
    found = GradientFidelity()
    if gradients.empty:
        return replace(found, not_testable="the table of gradients is empty")
    values = ["cosine", "norm_ratio"]
    rows = gradients[np.isfinite(gradients[values].to_numpy(dtype=float)).all(axis=1)]
    if rows.empty:
        return replace(found, not_testable="no gradient is finite")
    by = [*SETTING, "arm", "part"]
    records = []
    for names, own in rows.groupby(by, sort=False):
        per_seed = own.groupby("seed")[values].mean()
        record = dict(zip(by, names, strict=True)) | {"seeds": len(per_seed), "steps": own["step"].nunique()}
        for value in values:
            record |= over_seeds(per_seed[value].to_numpy()).columns(value)
        records.append(record | {"lowest_cosine": own["cosine"].min()})
    grouped = rows.groupby([*by, "step"], sort=False)[values]
    curves = grouped.mean()
    for value in values:
        curves[f"{value}_lowest"] = grouped.min()[value]
        curves[f"{value}_highest"] = grouped.max()[value]
    return replace(found, summary=pd.DataFrame(records), curves=curves.reset_index())
