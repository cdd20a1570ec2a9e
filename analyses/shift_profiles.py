"""Who shifts: which layers, and which questions?

**Layers.** The eye compares the layers of a profile with each other, so an interval for each layer alone is
too narrow: with 30 layers some stray. The band is for the whole profile (`simultaneous_shares`). Whether the
profile is flat is tested on questions: does a layer's rate differ from the mean rate of all layers *of the
same question*? Signs of those differences are flipped by question, and the largest over layers gives the
p-values, so layers may be as correlated as they like (`permutation.sign_flip`).

**Questions.** A shifted share of 14% may be 14% of every question, or all of every seventh. Per question: the
share of its (position, layer) pairs that shifted, and at how many positions any layer did. `top_tenth` is the
share of all shifts that lie in the tenth of the questions that shift most; 10% if all have equally many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, GREY, Line, canvas, lines
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.along_texts import over_questions
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    by,
    percent_text,
    questions_words,
    ratio,
    share,
    share_of_questions,
)
from sst_interp.analyses.statistics.permutation import sign_flip


@dataclass(frozen=True, eq=False)
class LayerProfile(Shifts):
    """Shift rate per layer of one comparison and one pair of depths."""

    named = "Shift rate by layer"
    shown = "profile"
    share: Interval
    """Shifted share of all pairs: the mean of the profile."""
    profile: pd.DataFrame
    """The columns of `BasinShifts.by_layer`: layer, share, low, high (each layer alone), band_low, band_high
    (all at once) and so on; then off (a layer's rate minus the question's mean rate over layers, mean over
    questions), p, p_layers (of `off`: alone, and for all layers at once). A layer in which no question
    shifted has a band of no width, as any bootstrap of zeros."""

    @property
    def layers_off(self) -> int:
        """Layers whose rate differs from the mean of all layers, tested together at 0.05."""
        return int((self.profile["p_layers"] < 0.05).sum())

    @property
    def verdict(self) -> str:
        """Whether the profile is flat, and its highest and lowest layer with the band."""
        n, words = questions_words(self.n_questions), self.words.capitalize()
        rates = self.profile["share"].to_numpy()
        if rates.max() == 0:
            return f"No layer shifts below {self.threshold:.4g}. {words}; {n}."
        answer = f"{self.layers_off} of {len(rates)} layers differ from the mean of all"
        if not self.layers_off:
            answer = "No layer differs from the mean of all"
        if self.profile["p_layers"].isna().all():
            answer = "Whether layers differ is not tested"
        most, least = (_banded(self.profile.iloc[int(i)]) for i in (rates.argmax(), rates.argmin()))
        said = f"{answer}. {words}: {most} shifts most and {least} least (bands for all layers at once). "
        return said + f"{n.capitalize()}; sign flips over questions."

    def figure(self) -> go.Figure:
        """Shift rate by layer with the band for all layers at once, and the rate of the run."""
        rows = self.profile
        figure = lines(
            "Shift rate by layer",
            f"{self.subtitle}; 95% band for all layers at once",
            "layer (0-based)",
            "shifted share of pairs",
            [Line("shift rate", rows["layer"], rows["share"], rows["band_low"], rows["band_high"])],
            percent=True,
        )
        figure.add_hline(y=self.share.estimate, line={"color": GREY, "dash": "dot"})
        return figure


def _banded(row: pd.Series) -> str:
    words = f"layer {row['layer']:.0f} ({percent_text(float(row['share']))}"
    if math.isfinite(row["band_low"]):
        words += f" [{percent_text(float(row['band_low']))}, {percent_text(float(row['band_high']))}]"
    return f"{words})"


@analysis("Layers", "Which layers shift more than the average of all?", order=40)
def layer_profile(c: Contrast) -> LayerProfile:
    """The shift rate of every layer."""
    shifted, there = c.grid.shifted(c.threshold), c.grid.there
    question, _, layer = np.nonzero(there)
    rates = ratio(np.stack([shifted.sum(axis=1), there.sum(axis=1)], axis=-1))
    off = rates - np.nanmean(rates, axis=1, keepdims=True)
    if off.shape[1] == 1:  # one layer is its own mean
        off = np.full_like(off, np.nan)
    test = sign_flip(off, *c.resampling)
    profile = by("layer", c.grid.layers[layer], question, shifted[there], *c.resampling)
    return LayerProfile(
        **c.judged,
        n_questions=len(c.grid.questions),
        share=share(question, shifted[there], *c.resampling),
        profile=profile.assign(off=test.estimate, p=test.p_value, p_layers=test.p_family),
    )


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class ShiftsPerQuestion(Shifts):
    """How shifts are spread over the questions of one comparison and one pair of depths."""

    named = "Shifts per question"
    median: Interval
    """Median over questions of the shifted share of a question's pairs."""
    without: Interval
    """Share of questions in which nothing shifts."""
    top_tenth: Interval
    """Share of all shifts that lie in the tenth of the questions with the most."""
    per_question: pd.DataFrame
    """Columns question, pairs, shifted, share, positions, positions_shifted (a shift in any layer)."""

    @property
    def table(self) -> pd.DataFrame:
        """Quantiles over questions of the shifted share of pairs and of positions."""
        positions = self.per_question["positions_shifted"] / self.per_question["positions"]
        return pd.DataFrame(
            {
                "quantile": QUANTILES,
                "share of pairs": np.quantile(self.per_question["share"], QUANTILES),
                "share of positions": np.quantile(positions, QUANTILES),
            }
        )

    @property
    def verdict(self) -> str:
        """Whether it is a few questions that shift; median question, questions without, concentration."""
        n, words = questions_words(self.n_questions), self.words.capitalize()
        if not self.per_question["shifted"].any():
            return f"No question shifts. {words}: none of {n} has a shift below {self.threshold:.4g}."
        answer = "Most questions shift" if self.without.estimate < 0.5 else "Most questions never shift"
        if not self.without.estimate:
            answer = "Every question shifts"
        if self.top_tenth.estimate > 0.5 and self.n_questions > 1:
            answer = "A tenth of the questions has most of the shifts"
        said = f"{answer}. {words}: the median question shifts in {self.median.text(percent=True)} of its "
        said += f"pairs; {self.without.text(percent=True)} of {n} never shift; the tenth with the most has "
        return said + f"{self.top_tenth.text(percent=True)} of all shifts."

    def figure(self) -> go.Figure:
        """The shifted share of every question, from least to most."""
        rows = self.per_question.sort_values("share", kind="stable")
        figure = canvas(
            "Shifts per question",
            self.subtitle,
            "questions, from least to most",
            "shifted share of its pairs",
        )
        figure.add_bar(
            x=np.arange(1, len(rows) + 1), y=rows["share"],
            marker={"color": BLUE, "line": {"width": 0}},
            customdata=rows[["question", "pairs"]].to_numpy(),
            hovertemplate="question %{customdata[0]}: %{y:.1%} of %{customdata[1]:,} pairs<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
        return figure


@analysis("Questions", "Is it a few questions that shift, or every one?", order=50)
def shifts_per_question(c: Contrast) -> ShiftsPerQuestion:
    """How shifts are spread over questions."""
    shifted, there = c.grid.shifted(c.threshold), c.grid.there
    table = pd.DataFrame(
        {
            "question": c.grid.questions,
            "pairs": there.sum(axis=(1, 2)),
            "shifted": shifted.sum(axis=(1, 2)),
            "share": shifted.sum(axis=(1, 2)) / there.sum(axis=(1, 2)),
            "positions": there.any(axis=2).sum(axis=1),
            "positions_shifted": shifted.any(axis=2).sum(axis=1),
        }
    )
    shares, shifts = np.sort(table["share"].to_numpy()), np.sort(table["shifted"].to_numpy())

    def median(drawn: np.ndarray) -> np.ndarray:
        cumulative = np.cumsum(drawn, axis=1)
        half = len(shares) / 2
        low, high = (cumulative < half).sum(axis=1), (cumulative <= half).sum(axis=1)
        return (shares[low] + shares[np.minimum(high, len(shares) - 1)]) / 2

    def top(drawn: np.ndarray) -> np.ndarray:
        # How often each is drawn, from the most shifts down, until a tenth of the questions is full.
        drawn, most = drawn[:, ::-1], shifts[::-1]
        room = len(shifts) / 10 - (np.cumsum(drawn, axis=1) - drawn)
        return ratio(np.stack([np.clip(room, 0, drawn) @ most, drawn @ most], axis=-1))

    # Both are given how often each question was drawn, in order of their shares and of their shifts.
    return ShiftsPerQuestion(
        **c.judged,
        n_questions=len(table),
        median=over_questions(len(table), median, *c.resampling),
        without=share_of_questions(shifts == 0, *c.resampling),
        top_tenth=over_questions(len(table), top, *c.resampling),
        per_question=table,
    )
