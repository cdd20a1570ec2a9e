"""Are an LRT's training schedules equivalent to sequential unrolling? In states, loss and gradients.

Interleaved and multi-refine passes stand in for one pass per token (arXiv 2605.26797). `sst_interp.latent`
compares them with exact back-propagation through time on given text; here come the means over questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures.approximation import _log, _questions, _series
from sst_interp.analyses.plots import canvas, empty_figure
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)

MODEL = ["model", "memory"]
SCHEDULE = ["method", "n"]
EQUIVALENT = 0.01
"""What is called equivalent here: states within 1%, and a cosine of gradients within 1% of 1."""
NAMES = {"interleaved": "interleaved S = {}", "multi_refine": "multi-refine K = {}"}
NEWEST, EVERY_PASS = "newest outputs", "every pass"
MAIN = ("interleaved", 2)
"""The published default."""


def schedule_words(method: Any, n: Any) -> str:
    """`interleaved S = 2`."""
    return NAMES[str(method)].format(int(n))


@dataclass(frozen=True, eq=False)
class LatentEquivalence(Result):
    """Schedules against sequential unrolling. Intervals are over questions; models are not pooled."""

    schedules: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per model, memory and schedule: `questions`, `passes` over all positions, `state` (relative L2
    error of the last layer's output, all positions together), `last` (the same at the last bin of positions),
    `loss_exact`, and `loss_change` (that of the newest outputs minus the exact one, nats), with `_low` and
    `_high`."""
    gradients: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per model, memory, schedule, loss (`of`: newest outputs, or the mean over every pass, which is
    trained on) and part (`weights`: of the backbone or adapters on it; `memory`: all of the LRT's own, and
    each by name): `cosine` with the exact gradient and `norm_ratio`, means over questions with `_low` and
    `_high`, and `lowest_cosine`."""
    positions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per model, memory, schedule and bin of positions: `state` with `_low` and `_high`."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Equivalence of an LRT's training schedules"

    @property
    def table(self) -> pd.DataFrame:
        """States and loss by model and schedule; cosine and norm of the gradient that is trained on."""
        if self.schedules.empty:
            return self.schedules
        found = self.schedules
        for part in ("weights", "memory"):
            own = self.gradients[(self.gradients["of"] == EVERY_PASS) & (self.gradients["part"] == part)]
            columns = {f"{c}{end}": f"{part}_{c}{end}" for c in ("cosine", "norm_ratio") for end in ENDS}
            found = found.merge(own.rename(columns=columns)[[*MODEL, *SCHEDULE, *columns.values()]])
        return found

    @property
    def verdict(self) -> str:
        """Model by model: the published default, and which schedules are equivalent by the 1% stated here."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        return " ".join(self._sentence(model, memory) for model, memory in _pairs(self.schedules))

    def _sentence(self, model: str, memory: str) -> str:
        rows = self.table[(self.table["model"] == model) & (self.table["memory"] == memory)]
        words = f"{model} ({memory}), {questions_words(int(rows['questions'].max()))}: "
        main = rows[(rows["method"] == MAIN[0]) & (rows["n"] == MAIN[1])]
        if len(main):
            r = main.iloc[0]
            words += (
                f"with {schedule_words(*MAIN)} the last layer is {_said(r, 'state')} off, the loss by "
                f"{_said(r, 'loss_change', '+')} nats, and the gradient that is trained on has a cosine of "
                f"{_said(r, 'weights_cosine')} with the exact one for the weights and "
                f"{_said(r, 'memory_cosine')} for the memory's own, at {r['weights_norm_ratio']:.2g} and "
                f"{r['memory_norm_ratio']:.2g} of its norm; "
            )
        same = rows[(rows["state"] < EQUIVALENT) & (rows["loss_change"].abs() < EQUIVALENT)]
        if same.empty:
            best = rows.sort_values("state").iloc[0]
            words += (
                f"no schedule measured is within {EQUIVALENT:.0%} in states and {EQUIVALENT} nats in loss; "
                f"the nearest is {schedule_words(best['method'], best['n'])} ({best['state']:.2g})"
            )
        else:
            names = [schedule_words(m, n) for m, n in zip(same["method"], same["n"], strict=True)]
            words += f"within {EQUIVALENT:.0%} in states and {EQUIVALENT} nats in loss: {', '.join(names)}"
            turned = 1 - same[["weights_cosine", "memory_cosine"]].min(axis=1)
            true = [name for name, t in zip(names, turned, strict=True) if t < EQUIVALENT]
            words += f"; in the direction of gradients too: {', '.join(true) if true else 'none'}"
        return words + "."

    def figure(self) -> go.Figure:
        """Error of the last layer against the number of groups or sweeps."""
        if self.schedules.empty:
            return empty_figure(self.title, f"not testable: {self.not_testable}")
        x, y = "S (groups) or K (sweeps), log scale", "relative error of the last layer (L2), log scale"
        figure = canvas("States against sequential unrolling", _questions(self.schedules), x, y)
        _series(figure, self.schedules, "n", "state", self._lines(self.schedules))
        return _log(figure)

    def figures(self) -> dict[str, go.Figure]:
        """States, gradients that are trained on, and for every model the error by position."""
        drawn = {"states": self.figure()}
        if self.schedules.empty:
            return drawn
        for part, words in (("weights", "weights"), ("memory", "the memory's own weights")):
            rows = self.gradients[(self.gradients["of"] == EVERY_PASS) & (self.gradients["part"] == part)]
            x, y = "S (groups) or K (sweeps), log scale", "cosine with the exact gradient"
            figure = canvas(f"Gradient of {words}", _questions(self.schedules), x, y)
            _series(figure, rows, "n", "cosine", self._lines(rows))
            figure.update_xaxes(type="log")
            drawn[f"gradient, {part}"] = figure
        for model, memory in _pairs(self.positions):
            own = self.positions[(self.positions["model"] == model) & (self.positions["memory"] == memory)]
            x = "position in the text, first of its bin (0-based; log scale from 1)"
            y = "relative error of the last layer (L2), log scale"
            figure = canvas("Error by position", f"{model} ({memory}); {_questions(own)}", x, y)
            named = {schedule_words(m, n): r for (m, n), r in own.groupby(SCHEDULE)}
            _series(figure, own, "position", "state", {k: r[r["position"] > 0] for k, r in named.items()})
            drawn[f"by position, {model}, {memory}"] = _log(figure)
        return drawn

    def _lines(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        by = rows.groupby([*MODEL, "method"], sort=False)
        return {
            f"{str(method).replace('_', '-')}, {model} ({memory})": r for (model, memory, method), r in by
        }


ENDS = ("", "_low", "_high")


def latent_equivalence(
    states: pd.DataFrame, gradients: pd.DataFrame, resamples: int = RESAMPLES
) -> LatentEquivalence:
    """Means over questions, with intervals that resample questions.

    Args:
        states, gradients: the tables of `latent.named.read_equivalence`: see `latent.equivalence.Compared`,
            with the columns model and memory. Questions with numbers that are not finite are left out.
        resamples: question resamples.

    Returns:
        The result; one whose verdict begins "not testable:" if there is no such question.
    """
    found = LatentEquivalence()
    if states.empty or gradients.empty:
        return replace(found, not_testable="nothing has been measured yet")
    of = [*MODEL, "id"]
    bad = pd.concat([
        states.loc[~np.isfinite(states["error2"].to_numpy(dtype=float)), of],
        gradients.loc[~np.isfinite(gradients["loss"].to_numpy(dtype=float)), of],
    ])  # fmt: skip
    states, gradients = (
        t[~pd.MultiIndex.from_frame(t[of]).isin(pd.MultiIndex.from_frame(bad))] for t in (states, gradients)
    )
    if states.empty or gradients.empty:
        return replace(found, not_testable="no question has finite states and losses")
    by, records, positions = [*MODEL, *SCHEDULE], [], []
    losses = gradients[gradients["of"] == NEWEST].drop_duplicates([*by, "id"]).set_index(by).sort_index()
    for names, own in states.groupby(by, sort=False):
        about = dict[str, Any](zip(by, names, strict=True))
        here = losses.loc[[names]]
        end = own[own["position"] == own["position"].max()]
        record = about | {"questions": own["id"].nunique(), "loss_exact": float(here["loss_exact"].mean())}
        record |= {"passes": 2 if about["method"] == "interleaved" else 1 + int(about["n"])}
        records.append(
            record
            | as_columns(
                state=_error(own, resamples),
                last=_error(end, resamples),
                loss_change=_mean((here["loss"] - here["loss_exact"]).to_numpy(), resamples),
            )
        )
        for position, rows in own.groupby("position"):
            record = about | {"position": position, "questions": rows["id"].nunique()}
            positions.append(record | as_columns(state=_error(rows, resamples)))
    turned = []
    for names, own in gradients.groupby([*by, "of", "part"], sort=False):
        values = {name: own[name].to_numpy(dtype=float) for name in ("cosine", "norm_ratio")}
        record = dict(zip([*by, "of", "part"], names, strict=True)) | {"questions": own["id"].nunique()}
        record |= as_columns(**{name: _mean(v, resamples) for name, v in values.items()})
        turned.append(
            record
            | {
                "lowest_cosine": float(np.nanmin(values["cosine"]))
                if np.isfinite(values["cosine"]).any()
                else np.nan
            }
        )
    return replace(
        found,
        schedules=pd.DataFrame(records),
        gradients=pd.DataFrame(turned),
        positions=pd.DataFrame(positions),
    )


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


def _said(row: pd.Series, name: str, sign: str = "") -> str:
    value, low, high = (row[f"{name}{end}"] for end in ENDS)
    ends = f" [{low:{sign}.2g}, {high:{sign}.2g}]" if np.isfinite(low) else ""
    return f"{value:{sign}.2g}{ends}"
