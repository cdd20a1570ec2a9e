"""How true are the states and gradients of few passes, against exact back-propagation through time?

`GradientFidelity` is of a small SST along its two-pass training (study `small`; the unit is a seed),
`LatentEquivalence` of an LRT on given texts (study `lrt-equivalence`; the unit is a question): interleaved
and multi-refine passes stand in for one pass per token (arXiv 2605.26797).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sst_interp.analyses.plots import GREY, TEMPLATE, canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)
from sst_interp.analyses.statistics.bootstrap import over_seeds, seeds_words
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.errors import COLOURS, POSITION, add_series, logarithmic, questions_of

ENDS = ("", "_low", "_high")
SETTING = ["alpha_low", "alpha_high"]
PARTS = {"weights": "weights", "alpha": "alpha (its logit)"}
TWO_PASS = "two-pass"

MODEL = ["model", "memory"]
SCHEDULE = ["method", "n"]
EQUIVALENT = 0.01
"""What is called equivalent here: states within 1%, and a cosine of gradients within 1% of 1."""
NAMES = {"interleaved": "interleaved S = {}", "multi_refine": "multi-refine K = {}"}
NEWEST, EVERY_PASS = "newest outputs", "every pass"
"""Which loss: that of the positions' newest outputs, as sequential unrolling has it; or the mean over all
passes, the first one without a memory included, which is what these schedules minimise."""
MAIN = ("interleaved", 2)
"""The published default."""


def bounds_words(low: float, high: float) -> str:
    """How a setting is called."""
    return f"alpha in [{low:g}, {high:g}]"


def schedule_words(method: Any, n: Any) -> str:
    """`interleaved S = 2`."""
    return NAMES[str(method)].format(int(n))


@dataclass(frozen=True, eq=False)
class GradientFidelity(Result):
    """Gradients of few sweeps against exact ones. Intervals are over seeds; settings are not pooled."""

    summary: pd.DataFrame
    """A row per setting, arm and part: seeds, steps, and over them `cosine` and `norm_ratio` (mean of each
    seed's mean over the training) with `_low` and `_high`, and `lowest_cosine` of any step and seed."""
    curves: pd.DataFrame
    """A row per setting, arm, part and step: means over seeds of `cosine` and `norm_ratio`, and their lowest
    and highest seed."""

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
        by: Any = self.summary.groupby(SETTING)
        told = [self._told(low, high, rows) for (low, high), rows in by]
        return (
            " ".join(words for words in told if words) or "Not testable: no two-pass gradient was measured."
        )

    def _told(self, low: float, high: float, rows: pd.DataFrame) -> str:
        sentences = []
        for part, words in PARTS.items():
            own = rows[rows["part"] == part].set_index("arm")
            if TWO_PASS not in own.index:
                continue
            two, best = own.loc[TWO_PASS], str(own["cosine"].idxmax())
            sentences.append(
                f"The two-pass gradient of {words} has a cosine of {two['cosine']:.3f} with the exact one "
                f"(lowest {two['lowest_cosine']:.3f}) and {two['norm_ratio']:.2f} times its norm."
            )
            if best != TWO_PASS:
                sentences.append(f"Nearest is {best}, cosine {own.loc[best, 'cosine']:.3f}.")
        if not sentences:
            return ""
        head = f"{bounds_words(low, high)}, {seeds_words(int(rows['seeds'].max()))}."
        return " ".join([head, *sentences])

    def figure(self) -> go.Figure:
        """Cosine (above) and norm ratio (below) over the training, in the widest setting."""
        settings: Any = self.curves.groupby(SETTING).groups
        return self._setting(*max(settings, key=lambda ends: ends[1]))

    def figures(self) -> dict[str, go.Figure]:
        """A figure per setting."""
        settings: Any = self.curves.groupby(SETTING).groups
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
                    figure.add_scatter(
                        x=own["step"], y=own[name], name=arm, legendgroup=arm, line={"color": colour},
                        mode="lines+markers", marker={"size": 4}, showlegend=row == 1 and column == 1,
                        customdata=own[[f"{name}_lowest", f"{name}_highest"]].to_numpy(), row=row, col=column,
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
        gradients: the table `gradients` of the study `small`: alpha_low, alpha_high, seed, step, arm, part,
            cosine, norm_ratio. Rows that are not finite are left out.

    Raises:
        Untestable: there is no such row.
    """
    if gradients.empty:
        raise Untestable("the table of gradients is empty")
    values = ["cosine", "norm_ratio"]
    rows = gradients[np.isfinite(gradients[values].to_numpy(dtype=float)).all(axis=1)]
    if rows.empty:
        raise Untestable("no gradient is finite")
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
        curves[f"{value}_lowest"], curves[f"{value}_highest"] = grouped.min()[value], grouped.max()[value]
    return GradientFidelity(pd.DataFrame(records), curves.reset_index())


@dataclass(frozen=True, eq=False)
class LatentEquivalence(Result):
    """An LRT's schedules against sequential unrolling. Intervals are over questions; models stay apart."""

    schedules: pd.DataFrame
    """A row per model, memory and schedule: `questions`, `passes` over all positions, `state` (relative L2
    error of the last layer's output, all positions together), `last` (the same at the last bin of positions),
    `loss_exact`, and `loss_change` (that of the newest outputs minus the exact one, nats), with `_low` and
    `_high`."""
    gradients: pd.DataFrame
    """A row per model, memory, schedule, loss (`of`: newest outputs, or the mean over every pass, which is
    trained on) and part (`weights`: of the backbone or adapters on it; `memory`: all of the LRT's own, and
    each by name): `cosine` with the exact gradient and `norm_ratio`, means over questions with `_low` and
    `_high`, and `lowest_cosine`."""
    positions: pd.DataFrame
    """A row per model, memory, schedule and bin of positions: `state` with `_low` and `_high`."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Equivalence of an LRT's training schedules"

    @property
    def table(self) -> pd.DataFrame:
        """States and loss by model and schedule; cosine and norm of the gradient that is trained on."""
        table = self.schedules
        for part in ("weights", "memory"):
            own = self.gradients[(self.gradients["of"] == EVERY_PASS) & (self.gradients["part"] == part)]
            columns = {f"{c}{end}": f"{part}_{c}{end}" for c in ("cosine", "norm_ratio") for end in ENDS}
            table = table.merge(own.rename(columns=columns)[[*MODEL, *SCHEDULE, *columns.values()]])
        return table

    @property
    def verdict(self) -> str:
        """Model by model: which schedules are equivalent by the 1% stated here, and the published default."""
        return " ".join(self._told(model, memory) for model, memory in _pairs(self.schedules))

    def _told(self, model: str, memory: str) -> str:
        rows = self.table[(self.table["model"] == model) & (self.table["memory"] == memory)]
        sentences = [f"{model} ({memory}), {questions_words(int(rows['questions'].max()))}."]
        same = rows[(rows["state"] < EQUIVALENT) & (rows["loss_change"].abs() < EQUIVALENT)]
        limits = f"within {EQUIVALENT:.0%} in states and {EQUIVALENT} nats in loss"
        if same.empty:
            best = rows.sort_values("state").iloc[0]
            nearest = schedule_words(best["method"], best["n"])
            sentences.append(f"No schedule is {limits}; the nearest is {nearest} ({best['state']:.2g} off).")
        else:
            names = [schedule_words(m, n) for m, n in zip(same["method"], same["n"], strict=True)]
            turned = 1 - same[["weights_cosine", "memory_cosine"]].min(axis=1)
            true = [name for name, t in zip(names, turned, strict=True) if t < EQUIVALENT]
            sentences.append(f"Equivalent, {limits}: {', '.join(names)}.")
            sentences.append(f"In the direction of gradients too: {', '.join(true) if true else 'none'}.")
        main = rows[(rows["method"] == MAIN[0]) & (rows["n"] == MAIN[1])]
        if len(main):
            row = main.iloc[0]
            sentences += [
                f"With {schedule_words(*MAIN)} the last layer is {_text(row, 'state')} off, the loss "
                f"{_text(row, 'loss_change', '+')} nats.",
                "The gradient that is trained on has a cosine with the exact one of "
                f"{_text(row, 'weights_cosine')} for the weights and {_text(row, 'memory_cosine')} for the "
                "memory's own.",
            ]
        return " ".join(sentences)

    def figure(self) -> go.Figure:
        """Error of the last layer against the number of groups or sweeps."""
        x, y = "S (groups) or K (sweeps), log scale", "relative error of the last layer (L2), log scale"
        figure = canvas("States against sequential unrolling", questions_of(self.schedules), x, y)
        add_series(figure, "n", "state", self._lines(self.schedules))
        return logarithmic(figure)

    def figures(self) -> dict[str, go.Figure]:
        """States, gradients that are trained on, and for every model the error by position."""
        drawn = {"states": self.figure()}
        for part, words in (("weights", "weights"), ("memory", "the memory's own weights")):
            rows = self.gradients[(self.gradients["of"] == EVERY_PASS) & (self.gradients["part"] == part)]
            x, y = "S (groups) or K (sweeps), log scale", "cosine with the exact gradient"
            figure = canvas(f"Gradient of {words}", questions_of(self.schedules), x, y)
            add_series(figure, "n", "cosine", self._lines(rows))
            figure.update_xaxes(type="log")
            drawn[f"gradient, {part}"] = figure
        for model, memory in _pairs(self.positions):
            own = self.positions[(self.positions["model"] == model) & (self.positions["memory"] == memory)]
            y = "relative error of the last layer (L2), log scale"
            about = f"{model} ({memory}); {questions_of(own)}"
            figure = canvas("Error by position", about, POSITION, y)
            later = own[own["position"] > 0]
            named = {schedule_words(m, n): rows for (m, n), rows in later.groupby(SCHEDULE)}
            add_series(figure, "position", "state", named)
            drawn[f"by position, {model}, {memory}"] = logarithmic(figure)
        return drawn

    def _lines(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        by = rows.groupby([*MODEL, "method"], sort=False)
        return {
            f"{str(method).replace('_', '-')}, {model} ({memory})": r for (model, memory, method), r in by
        }


def latent_equivalence(
    states: pd.DataFrame, gradients: pd.DataFrame, resamples: int = RESAMPLES
) -> LatentEquivalence:
    """Means over questions, with intervals that resample questions.

    Args:
        states, gradients: the tables of the study `lrt-equivalence` (`against_exact.Compared`, with the
            columns model and memory). Questions with numbers that are not finite are left out.
        resamples: question resamples.

    Raises:
        Untestable: there is no such question.
    """
    if states.empty or gradients.empty:
        raise Untestable("nothing has been measured yet")
    of = [*MODEL, "id"]
    bad = pd.concat([
        states.loc[~np.isfinite(states["error2"].to_numpy(dtype=float)), of],
        gradients.loc[~np.isfinite(gradients["loss"].to_numpy(dtype=float)), of],
    ])  # fmt: skip
    states, gradients = (
        t[~pd.MultiIndex.from_frame(t[of]).isin(pd.MultiIndex.from_frame(bad))] for t in (states, gradients)
    )
    if states.empty or gradients.empty:
        raise Untestable("no question has finite states and losses")
    by, records, positions = [*MODEL, *SCHEDULE], [], []
    losses = gradients[gradients["of"] == NEWEST].drop_duplicates([*by, "id"]).set_index(by).sort_index()
    for names, own in states.groupby(by, sort=False):
        about = dict[str, Any](zip(by, names, strict=True))
        here = losses.loc[[names]]
        end = own[own["position"] == own["position"].max()]
        change = (here["loss"] - here["loss_exact"]).to_numpy()
        record = about | {"questions": own["id"].nunique(), "loss_exact": float(here["loss_exact"].mean())}
        record |= {"passes": 2 if about["method"] == "interleaved" else 1 + int(about["n"])}
        record |= as_columns(state=_error(own, resamples), last=_error(end, resamples))
        records.append(record | as_columns(loss_change=_mean(change, resamples)))
        for position, rows in own.groupby("position"):
            record = about | {"position": position, "questions": rows["id"].nunique()}
            positions.append(record | as_columns(state=_error(rows, resamples)))
    turned = []
    for names, own in gradients.groupby([*by, "of", "part"], sort=False):
        values = {name: own[name].to_numpy(dtype=float) for name in ("cosine", "norm_ratio")}
        record = dict(zip([*by, "of", "part"], names, strict=True)) | {"questions": own["id"].nunique()}
        record |= as_columns(**{name: _mean(v, resamples) for name, v in values.items()})
        cosines = values["cosine"][np.isfinite(values["cosine"])]
        turned.append(record | {"lowest_cosine": float(cosines.min()) if len(cosines) else np.nan})
    return LatentEquivalence(pd.DataFrame(records), pd.DataFrame(turned), pd.DataFrame(positions))


def _error(rows: pd.DataFrame, resamples: int) -> Interval:
    """Relative L2 error, all positions together: sqrt(sum of squared errors / sum of squared norms)."""
    sums = rows.groupby("id")[["error2", "norm2"]].sum().to_numpy(dtype=float)
    return cluster_bootstrap(sums, lambda totals: np.sqrt(ratio(totals)), resamples)


def _mean(values: np.ndarray, resamples: int) -> Interval:
    """Mean over questions; those without a value are left out."""
    values = values[np.isfinite(values)]
    return cluster_bootstrap(np.stack([values, np.ones_like(values)], axis=1), ratio, resamples)


def _pairs(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return list(rows[MODEL].drop_duplicates().itertuples(index=False, name=None))


def _text(row: pd.Series, name: str, sign: str = "") -> str:
    value, low, high = (row[f"{name}{end}"] for end in ENDS)
    ends = f" [{low:{sign}.2g}, {high:{sign}.2g}]" if np.isfinite(low) else ""
    return f"{value:{sign}.2g}{ends}"
