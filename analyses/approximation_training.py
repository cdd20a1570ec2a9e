"""What the approximation costs: models trained with it, and the exactly trained one, under exact evaluation.

All arms of a seed start from the same weights and see the same data (`sst_interp.approximation.study`), so
that differences are taken within a seed. The unit is a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.approximation_gradients import SETTING, bounds_words
from sst_interp.analyses.figures.approximation import COLOURS
from sst_interp.analyses.plots import GREY, canvas, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.seeds import OverSeeds, over_seeds, seeds_words

EXACT, TWO_PASS, BASELINE = "exact", "two-pass", "no stream"


@dataclass(frozen=True, eq=False)
class TrainingCost(Result):
    """Final losses by how states were found in training. Intervals are over seeds; settings stay apart."""

    finals: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per setting and arm: seeds, step, alpha (mean at the end), `loss` under exact evaluation and
    `own` as the arm computes states (nats per label) with `_low` and `_high`, `accuracy` under exact
    evaluation, `behind`: loss minus that of the exactly trained model of the same seed, and `ratio`: median
    time of a step over a step without a stream."""
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per setting, arm and step: `loss` under exact evaluation (mean over seeds), lowest, highest."""
    distances: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per setting, arm and distance (positions since the value was set), at the end under exact
    evaluation: `loss` and `accuracy`, all seeds' labels together, and `labels`."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Cost of the approximation in training"

    @property
    def table(self) -> pd.DataFrame:
        """A row per setting and arm."""
        return self.finals

    @property
    def verdict(self) -> str:
        """Setting by setting: what two-pass training ends at, and how far behind exact training."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        return " ".join(self._sentence(low, high) for low, high in self.finals.groupby(SETTING).groups)

    def behind(self, arm: str, low: float, high: float) -> OverSeeds:
        """An arm's final exact loss minus the exactly trained model's, over seeds."""
        row = _row(self.finals, low, high, arm)
        ends = [float(row[f"behind{end}"]) for end in ("", "_low", "_high")]
        return OverSeeds(*ends, row["behind_lowest"], row["behind_highest"], int(row["seeds"]))

    def _sentence(self, low: float, high: float) -> str:
        rows = self.finals[(self.finals["alpha_low"] == low) & (self.finals["alpha_high"] == high)]
        arms = set(rows["arm"])
        words = f"{bounds_words(low, high)}, {seeds_words(int(rows['seeds'].max()))}: "
        if not {EXACT, TWO_PASS} <= arms:
            return words + "not testable: exact and two-pass training are both needed."
        d = self.behind(TWO_PASS, low, high)
        if not d.n or not np.isfinite(d.mean):
            return words + "not testable: no seed has both trainings."
        exact, two = (_row(rows, low, high, arm) for arm in (EXACT, TWO_PASS))
        words += (
            f"under exact evaluation two-pass training ends at {two['loss']:.3f} nats per label, exact "
            f"training at {exact['loss']:.3f}: two-pass is {_said(d)}"
        )
        if BASELINE in arms:
            plain = _row(rows, low, high, BASELINE)["loss"]
            words += f"; without a stream {plain:.3f}"
            if plain > exact["loss"]:
                kept = (plain - two["loss"]) / (plain - exact["loss"])
                words += f", so that two passes keep {kept:.0%} of what the stream gains"
            else:
                words += ", so that the stream gains nothing here"
        gap = two["own"] - two["loss"]
        words += f"; evaluated in two passes it has {two['own']:.3f} ({gap:+.3f})"
        return words + "."

    def figure(self) -> go.Figure:
        """Final loss under exact evaluation by arm, one colour per setting."""
        if self.finals.empty:
            return empty_figure(self.title, f"not testable: {self.not_testable}")
        n = seeds_words(int(self.finals["seeds"].max()))
        subtitle = f"{n}; bars: lowest and highest seed"
        figure = canvas(
            "Final loss by training", subtitle, "loss under exact evaluation (nats per label)", ""
        )
        for ((low, high), own), colour in zip(self.finals.groupby(SETTING), COLOURS, strict=False):
            bar = {
                "type": "data", "symmetric": False, "thickness": 1.5,
                "array": own["loss_highest"] - own["loss"], "arrayminus": own["loss"] - own["loss_lowest"],
            }  # fmt: skip
            figure.add_scatter(
                x=own["loss"], y=own["arm"], mode="markers", error_x=bar, name=bounds_words(low, high),
                marker={"size": 10, "color": colour},
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            )  # fmt: skip
        arms = list(dict.fromkeys(self.finals["arm"]))
        figure.update_yaxes(categoryorder="array", categoryarray=arms[::-1])
        figure.update_layout(height=150 + 40 * len(arms))
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """Final losses, and for every setting the loss over training and by distance."""
        drawn = {"final": self.figure()}
        for low, high in self.finals.groupby(SETTING).groups if len(self.finals) else []:
            words = bounds_words(low, high)
            drawn[f"over training, {words}"] = self._lines(self.curves, low, high, "step", "step")
            x = "positions since the value was set"
            drawn[f"by distance, {words}"] = self._lines(self.distances, low, high, "distance", x)
        return drawn

    def _lines(self, table: pd.DataFrame, low: float, high: float, x: str, unit: str) -> go.Figure:
        rows = table[(table["alpha_low"] == low) & (table["alpha_high"] == high)]
        n = seeds_words(int(self.finals["seeds"].max()))
        title = {"step": "Loss over training", "distance": "Final loss by distance"}[x]
        y = "loss under exact evaluation (nats per label)"
        figure = canvas(title, f"{bounds_words(low, high)}; mean of {n}", unit, y)
        for (arm, own), colour in zip(rows.groupby("arm", sort=False), (*COLOURS, GREY), strict=False):
            dash = "dot" if arm == BASELINE else "solid"
            figure.add_scatter(
                x=own[x], y=own["loss"], name=arm, mode="lines+markers", marker={"size": 5},
                line={"color": colour, "dash": dash},
                hovertemplate=f"{arm}, {x} %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(rangemode="tozero")
        return figure


def training_cost(losses: pd.DataFrame, times: pd.DataFrame | None = None) -> TrainingCost:
    """Final losses of every way to train, with their spread over seeds.

    Args:
        losses: the table `losses` of a study: alpha_low, alpha_high, seed, arm, step, evaluated, alpha,
            distance, and sums `labels`, `loss`, `correct`. Trainings with a loss that is not finite are left
            out.
        times: its table `times`: round, arm, seconds; None or empty leaves `ratio` NaN.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such training.
    """
    found = TrainingCost()
    if losses.empty:
        return replace(found, not_testable="the table of losses is empty")
    of = [*SETTING, "seed", "arm"]
    bad = losses.loc[~np.isfinite(losses["loss"].to_numpy(dtype=float)), of]
    losses = losses[~pd.MultiIndex.from_frame(losses[of]).isin(pd.MultiIndex.from_frame(bad))]
    if losses.empty:
        return replace(found, not_testable="no training has finite losses")
    sums = losses.groupby([*of, "step", "evaluated"], sort=False)[["labels", "loss", "correct"]].sum()
    means = sums[["loss", "correct"]].div(sums["labels"], axis=0)
    means["alpha"] = losses.groupby([*of, "step", "evaluated"], sort=False)["alpha"].first()
    looks = means.reset_index()
    last = looks[looks["step"] == looks.groupby(of)["step"].transform("max")]
    exact, own = (last[last["evaluated"] == name].set_index(of) for name in ("exact", "own"))
    truth = exact.xs(EXACT, level="arm")["loss"] if EXACT in exact.index.get_level_values("arm") else None
    ratios = _ratios(times)
    records = []
    for names, rows in exact.groupby([*SETTING, "arm"], sort=False):
        low, high, arm = names
        loss = rows["loss"]
        behind = (
            loss.droplevel("arm") - truth.reindex(loss.droplevel("arm").index)
            if truth is not None
            else loss * np.nan
        )
        record = {"alpha_low": low, "alpha_high": high, "arm": arm, "seeds": len(rows)}
        record |= {"step": int(rows["step"].max()), "alpha": rows["alpha"].mean()}
        for name, values in (
            ("loss", loss),
            ("own", own["loss"].reindex(rows.index)),
            ("accuracy", rows["correct"]),
            ("behind", behind),
        ):
            spread = over_seeds(values.to_numpy(dtype=float))
            record |= spread.columns(name)
            record |= {f"{name}_lowest": spread.lowest, f"{name}_highest": spread.highest}
        records.append(record | {"ratio": ratios.get(str(arm), np.nan)})
    # The exactly trained first, the one without a stream last, whatever was trained first.
    records.sort(key=lambda r: (r["alpha_low"], r["alpha_high"], {EXACT: 0, BASELINE: 2}.get(r["arm"], 1)))
    return replace(
        found, finals=pd.DataFrame(records), curves=_curves(looks), distances=_distances(losses, of)
    )


def _curves(looks: pd.DataFrame) -> pd.DataFrame:
    exact = looks[looks["evaluated"] == "exact"]
    grouped = exact.groupby([*SETTING, "arm", "step"], sort=False)["loss"]
    return grouped.agg(loss="mean", lowest="min", highest="max").reset_index()


def _distances(losses: pd.DataFrame, of: list[str]) -> pd.DataFrame:
    exact = losses[losses["evaluated"] == "exact"]
    last = exact[exact["step"] == exact.groupby(of)["step"].transform("max")]
    sums = last.groupby([*SETTING, "arm", "distance"], sort=False)[["labels", "loss", "correct"]].sum()
    rates = sums[["loss", "correct"]].div(sums["labels"], axis=0).rename(columns={"correct": "accuracy"})
    return rates.assign(labels=sums["labels"])[sums["labels"] > 0].reset_index()


def _ratios(times: pd.DataFrame | None) -> dict[str, float]:
    """Arm -> median over rounds of its seconds over those of a step without a stream in the same round."""
    if times is None or times.empty or BASELINE not in set(times["arm"]):
        return {}
    wide = times.pivot_table(index="round", columns="arm", values="seconds")
    return {str(arm): float(v) for arm, v in wide.div(wide[BASELINE], axis=0).median().items()}


def _row(finals: pd.DataFrame, low: float, high: float, arm: str) -> pd.Series:
    here = (finals["alpha_low"] == low) & (finals["alpha_high"] == high) & (finals["arm"] == arm)
    return finals[here].iloc[0]


def _said(d: OverSeeds) -> str:
    """A difference of losses in words, with what the interval says."""
    words = f"{d.text('+')} nats behind"
    if not np.isfinite(d.low):
        return words
    if d.low <= 0 <= d.high:
        return words + " (no cost is shown)"
    return words + (" (it costs)" if d.low > 0 else " (it is better)")
