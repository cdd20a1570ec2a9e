"""What a training schedule of an LRT costs: final losses under *sequential* evaluation.

All arms of a seed start from the same weights, see the same data and take the same number of steps
(`sst_interp.latent.schedules`), so that differences are taken within a seed. The unit is a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures.approximation import COLOURS
from sst_interp.analyses.plots import BLUE, GREY, VERMILLION, canvas, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.seeds import OverSeeds, over_seeds, seeds_words

EXACT, BASELINE = "exact", "no memory"


@dataclass(frozen=True, eq=False)
class LatentTraining(Result):
    """Final losses by training schedule. Intervals are over seeds."""

    finals: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per arm: `seeds`; `loss` under sequential evaluation and `own` as the arm computes states (nats
    per label), `gap` (loss - own), `behind` (loss minus that of exact training of the same seed), `against`
    (loss minus that of training without a memory) and `accuracy`, each with `_low` and `_high`; `lowest` and
    `highest` loss of a seed; `ratio`, median time of a step over one without a memory."""
    distances: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per arm and distance (positions since the value was set), sequential evaluation: `loss`,
    `accuracy`, all seeds' labels together, and `labels`."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "An LRT trained with each schedule"

    @property
    def table(self) -> pd.DataFrame:
        """A row per arm."""
        return self.finals

    @property
    def verdict(self) -> str:
        """What every schedule ends at, and whether it is behind exact training."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        words = f"{seeds_words(int(self.finals['seeds'].max()))}, sequential evaluation: "
        rows = {row["arm"]: row for row in self.finals.to_dict("records")}
        if EXACT not in rows:
            return words + "not testable: without exact training there is nothing to compare with."
        words += f"exact training ends at {rows[EXACT]['loss']:.3g} nats per label"
        if BASELINE in rows:
            words += f", training without a memory at {rows[BASELINE]['loss']:.3g}"
        said = [f"{arm} {_behind(row)}" for arm, row in rows.items() if arm not in (EXACT, BASELINE)]
        words += f". Behind exact training: {'; '.join(said)}." if said else "."
        lost = [arm for arm, row in rows.items() if arm != BASELINE and row["against_low"] > 0]
        if lost:
            words += f" Worse than no memory at all, read sequentially: {', '.join(lost)}."
        fooled = [
            f"{arm} ({row['own']:.3g} as trained, {row['loss']:.3g} sequentially)"
            for arm, row in rows.items()
            if row["gap_low"] > 0 or row["gap_high"] < 0
        ]
        if fooled:
            words += f" The loss of the schedule's own states is another one for {'; '.join(fooled)}."
        return words

    def figure(self) -> go.Figure:
        """Final loss by arm: under sequential evaluation, and as the arm computes states."""
        if self.finals.empty:
            return empty_figure(self.title, f"not testable: {self.not_testable}")
        n = seeds_words(int(self.finals["seeds"].max()))
        x, words = "loss (nats per label, log scale)", f"{n}; bars: 95% over seeds"
        figure = canvas("Final loss by training schedule", words, x, "")
        for name, column, colour, symbol in (
            ("sequential evaluation", "loss", BLUE, "circle"),
            ("as the schedule computes states", "own", VERMILLION, "diamond-open"),
        ):
            mean, low, high = (self.finals[f"{column}{end}"] for end in ("", "_low", "_high"))
            # An interval that reaches below 0 has no end on a log axis: it is cut at a tenth of the mean.
            bar = {
                "type": "data", "symmetric": False, "thickness": 1.5,
                "array": (high - mean).fillna(0), "arrayminus": (mean - low).clip(upper=0.9 * mean).fillna(0),
            }  # fmt: skip
            figure.add_scatter(
                x=mean, y=self.finals["arm"], mode="markers", error_x=bar, name=name,
                marker={"size": 10, "color": colour, "symbol": symbol},
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            )  # fmt: skip
        figure.update_xaxes(type="log")
        arms = list(self.finals["arm"])
        figure.update_yaxes(categoryorder="array", categoryarray=arms[::-1])
        figure.update_layout(height=170 + 40 * len(arms))
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """Final losses, and by how long ago the value was set."""
        if self.finals.empty:
            return {"final": self.figure()}
        n = seeds_words(int(self.finals["seeds"].max()))
        x, y = "positions since the value was set", "loss, sequential evaluation (nats per label)"
        figure = canvas("Final loss by distance", f"all labels of {n}", x, y)
        for (arm, own), colour in zip(
            self.distances.groupby("arm", sort=False), (*COLOURS, GREY), strict=False
        ):
            figure.add_scatter(
                x=own["distance"], y=own["loss"], name=str(arm), mode="lines+markers", marker={"size": 5},
                line={"color": colour, "dash": "dot" if arm == BASELINE else "solid"},
                hovertemplate=f"{arm}, distance %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        return {"final": self.figure(), "by distance": figure}


def latent_training(losses: pd.DataFrame, times: pd.DataFrame | None = None) -> LatentTraining:
    """Final losses of every schedule, with their spread over seeds.

    Args:
        losses: the table `losses` of `latent.schedules`: seed, arm, evaluated, distance, and sums `labels`,
            `loss`, `correct`. Trainings with a loss that is not finite are left out.
        times: its table `times`: round, arm, seconds; None or empty leaves `ratio` NaN.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such training.
    """
    found = LatentTraining()
    if losses.empty:
        return replace(found, not_testable="the table of losses is empty")
    of = ["arm", "seed"]
    bad = losses.loc[~np.isfinite(losses["loss"].to_numpy(dtype=float)), of]
    losses = losses[~pd.MultiIndex.from_frame(losses[of]).isin(pd.MultiIndex.from_frame(bad))]
    if losses.empty:
        return replace(found, not_testable="no training has finite losses")
    sums = losses.groupby([*of, "evaluated"], sort=False)[["labels", "loss", "correct"]].sum()
    means = sums[["loss", "correct"]].div(sums["labels"], axis=0).reset_index()
    by_seed = {
        (str(arm), str(how)): rows.set_index("seed")
        for (arm, how), rows in means.groupby(["arm", "evaluated"], sort=False)
    }
    ratios, records, nothing = _ratios(times), [], pd.Series(dtype=float)
    for arm in dict.fromkeys(losses["arm"]):
        if (arm, "sequential") not in by_seed:
            continue
        rows = by_seed[arm, "sequential"]
        loss = rows["loss"]
        own = by_seed[arm, "own"]["loss"] if (arm, "own") in by_seed else nothing
        others = {
            name: by_seed[other, "sequential"]["loss"] if (other, "sequential") in by_seed else nothing
            for name, other in (("behind", EXACT), ("against", BASELINE))
        }
        values = {
            "loss": loss,
            "own": own,
            "gap": loss - own.reindex(loss.index),
            "accuracy": rows["correct"],
        }
        values |= {name: loss - other.reindex(loss.index) for name, other in others.items()}
        record = {"arm": arm, "seeds": len(rows), "lowest": loss.min(), "highest": loss.max()}
        for name, of_seeds in values.items():
            record |= over_seeds(of_seeds.to_numpy(dtype=float)).columns(name)
        records.append(record | {"ratio": ratios.get(str(arm), np.nan)})
    if not records:
        return replace(found, not_testable="no training was evaluated sequentially")
    records.sort(key=lambda r: {EXACT: 0, BASELINE: 2}.get(r["arm"], 1))
    return replace(found, finals=pd.DataFrame(records), distances=_distances(losses))


def _distances(losses: pd.DataFrame) -> pd.DataFrame:
    last = losses[losses["evaluated"] == "sequential"]
    sums = last.groupby(["arm", "distance"], sort=False)[["labels", "loss", "correct"]].sum()
    rates = sums[["loss", "correct"]].div(sums["labels"], axis=0).rename(columns={"correct": "accuracy"})
    return rates.assign(labels=sums["labels"])[sums["labels"] > 0].reset_index()


def _ratios(times: pd.DataFrame | None) -> dict[str, float]:
    """Arm -> median over rounds of its seconds over those of a step without a memory in the same round."""
    if times is None or times.empty or BASELINE not in set(times["arm"]):
        return {}
    wide = times.pivot_table(index="round", columns="arm", values="seconds")
    return {str(arm): float(v) for arm, v in wide.div(wide[BASELINE], axis=0).median().items()}


def _behind(row: dict) -> str:
    d = OverSeeds(row["behind"], row["behind_low"], row["behind_high"], np.nan, np.nan, row["seeds"])
    words = f"{d.text('+')}"
    if not np.isfinite(d.low):
        return words
    return words + (
        " (no cost is shown)" if d.low <= 0 <= d.high else " (it costs)" if d.low > 0 else " (it is better)"
    )
