"""The training's approximation, measured (claim C15): how far are a few sweeps from the exact states?

SST V2 trains on a blend-off pass and one blended pass, and puts the error of that at the order of alpha
squared, 6e-4 to 1.2e-3 (arXiv 2605.00206). `sst_interp.approximation` compares such solutions with the exact
ones on given text; here its sums become relative errors, disagreements and losses with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import approximation as approximation_figures
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)

PAPER_ERROR = (6e-4, 1.2e-3)
"""What the paper gives for the error of its two passes: of the order of alpha squared."""
PAPER_ALPHA = 0.027
"""Mean of the paper's learned blend weights."""

CONDITION = ["model", "layers", "n_layers", "alpha"]
"""What names a blend: which model, which layers of it, how many, and their mean weight."""
SCHEDULE = ["groups", "sweeps"]

SUMS = ["error2", "norm2", "relative", "state", "argmax", "kl", "positions", "loss", "loss_exact", "tokens"]
_AT = {name: index for index, name in enumerate(SUMS)}


def logit_error(totals: np.ndarray) -> np.ndarray:
    """Relative L2 error of the logits, all positions together: |b - a| / |a|. Totals [..., sum] -> [...]."""
    return np.sqrt(ratio(totals[..., [_AT["error2"], _AT["norm2"]]]))


def state_error(totals: np.ndarray) -> np.ndarray:
    """Relative L2 error of a layer's output, mean over positions and layers."""
    return ratio(totals[..., [_AT["state"], _AT["positions"]]])


def argmax_share(totals: np.ndarray) -> np.ndarray:
    """Share of positions whose most likely token differs."""
    return ratio(totals[..., [_AT["argmax"], _AT["positions"]]])


def divergence(totals: np.ndarray) -> np.ndarray:
    """KL divergence of the exact next-token distribution from the approximate one, nats per position."""
    return ratio(totals[..., [_AT["kl"], _AT["positions"]]])


def loss_change(totals: np.ndarray) -> np.ndarray:
    """Approximate minus exact loss, nats per answer token."""
    top = totals[..., _AT["loss"]] - totals[..., _AT["loss_exact"]]
    return ratio(np.stack([top, totals[..., _AT["tokens"]]], axis=-1))


def exact_loss(totals: np.ndarray) -> np.ndarray:
    """Loss with the exact states, nats per answer token."""
    return ratio(totals[..., [_AT["loss_exact"], _AT["tokens"]]])


MEASURES = {
    "logit_error": logit_error,
    "state_error": state_error,
    "argmax": argmax_share,
    "kl": divergence,
    "loss_change": loss_change,
    "loss_exact": exact_loss,
}


@dataclass(frozen=True, eq=False)
class ApproximationError(Result):
    """Errors of sweeps against exact states. Intervals resample questions; models, blends and schedules are
    never pooled.
    """

    schedules: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per blend and schedule: model, layers, n_layers, alpha, L_alpha (their product), groups, sweeps,
    passes (sweeps and the blend-off pass), questions, and each of `MEASURES` with `_low` and `_high`."""
    positions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The same by bin of positions, in one group: `position` is the first position of a bin."""
    headline: dict[str, Interval] = field(default_factory=dict)
    """Model -> two-pass logit error, blended in all layers at the alpha nearest the paper's mean."""
    layerwise: float = float("nan")
    """Largest relative logit error of the layerwise solution, which is taken as exact, against the sequential
    one; NaN if none was measured."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Error of the training's approximation"

    @property
    def table(self) -> pd.DataFrame:
        """A row per blend and schedule."""
        return self.schedules

    @property
    def verdict(self) -> str:
        """Model by model, the two-pass error against the paper's range."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        parts = []
        for model, found in self.headline.items():
            row = headline_row(self.schedules, model)
            if row is None:
                continue
            parts.append(
                f"{model}, alpha {row['alpha']:.3g} in {row['n_layers']} layers, "
                f"{questions_words(found.n_questions)}: two-pass logits have a relative error of "
                f"{found.text()}, layer outputs of {row_interval(row, 'state_error').text()}, "
                f"{row['argmax']:.1%} of the most likely tokens differ, the loss by "
                f"{signed(row_interval(row, 'loss_change'))} nats per answer token; {against_paper(found)}"
            )
        words = ". ".join(parts)
        if np.isfinite(self.layerwise):
            words += f". The solution taken as exact is {self.layerwise:.1e} from the sequential one"
        return words + "."

    def figure(self) -> go.Figure:
        """Two-pass error by alpha, with the paper's line."""
        return approximation_figures.by_alpha(self)

    def figures(self) -> dict[str, go.Figure]:
        """By alpha, by L * alpha, by passes; by position and by groups for every model."""
        drawn = {
            "by_alpha": self.figure(),
            "by_layers": approximation_figures.by_alpha(self, x="L_alpha"),
            "by_passes": approximation_figures.by_passes(self),
        }
        for model in self.headline:
            drawn[f"by_position, {model}"] = approximation_figures.by_position(self, model)
            own = self.schedules[self.schedules["model"] == model]
            if (own["groups"] > 1).any():
                drawn[f"by_groups, {model}"] = approximation_figures.by_groups(self, model)
        return drawn


def approximation_error(
    errors: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> ApproximationError:
    """The errors of every blend and schedule in a table of `sst_interp.approximation.errors_by_name`.

    Args:
        errors: a row per (blend, schedule, question, bin of positions). Rows that are not finite are left
            out.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; one whose verdict begins "not testable:" if the table has no rows of sweeps.
    """
    if errors.empty:
        return ApproximationError(not_testable="the table of errors is empty")
    finite = np.isfinite(errors[SUMS].to_numpy(dtype=float)).all(axis=1)
    errors = errors[finite]
    sweeps = errors[(errors["method"] == "sweeps") & (errors["reference"] == "layerwise")]
    found = ApproximationError(layerwise=_layerwise(errors))
    if sweeps.empty:
        return replace(found, not_testable="no error of sweeps against exact states was measured")
    schedules = _measured(sweeps, [*CONDITION, *SCHEDULE], resamples, seed)
    positions = _measured(sweeps[sweeps["groups"] == 1], [*CONDITION, *SCHEDULE, "position"], resamples, seed)
    headline = {}
    for model in schedules["model"].unique():
        row = headline_row(schedules, model)
        if row is not None:
            headline[model] = row_interval(row, "logit_error")
    if not headline:
        return replace(
            found, schedules=schedules, positions=positions,
            not_testable="no two-pass error with the blend in all layers was measured",
        )  # fmt: skip
    return replace(found, schedules=schedules, positions=positions, headline=headline)


def question_sums(rows: pd.DataFrame) -> np.ndarray:
    """The sums of `SUMS` per question, [question, sum]."""
    return rows.groupby("question")[SUMS].sum().to_numpy(dtype=float)


def headline_row(schedules: pd.DataFrame, model: str) -> pd.Series | None:
    """A model's two-pass row, blended in all layers at the alpha nearest the paper's mean, or None."""
    rows = schedules[(schedules["model"] == model) & (schedules["layers"] == "all")]
    rows = rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]
    return None if rows.empty else rows.loc[(rows["alpha"] - PAPER_ALPHA).abs().idxmin()]


def row_interval(row: Mapping[Any, Any] | pd.Series, name: str) -> Interval:
    """The interval in a table's row: `name`, `name_low`, `name_high`, and how many `questions`."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    reason = None if np.isfinite(low) else "one question"
    return Interval(value, low, high, int(row["questions"]), reason=reason)


def against_paper(found: Interval) -> str:
    """A two-pass error and the paper's range for it, in words."""
    low, high = PAPER_ERROR
    words = f"the paper's {low:g} to {high:g}"
    if not found.known:
        return f"not testable against {words}: {found.reason}"
    if found.low > high:
        return f"{words} does not hold ({found.estimate / high:.0f} times its upper end)"
    return f"{words} holds" if found.high <= high else f"neither above nor within {words} for certain"


def signed(interval: Interval) -> str:
    """`+0.41 [+0.3, +0.5]`."""
    if not interval.known:
        return f"{interval.estimate:+.2g}"
    return f"{interval.estimate:+.2g} [{interval.low:+.2g}, {interval.high:+.2g}]"


def _measured(rows: pd.DataFrame, by: Sequence[str], resamples: int, seed: int) -> pd.DataFrame:
    """A row per group of `by` with every measure."""
    records = []
    for names, own in rows.groupby(list(by), sort=True):
        sums = question_sums(own)
        named = dict(zip(by, names, strict=True))
        intervals = {
            name: cluster_bootstrap(sums, measure, resamples, seed=seed) for name, measure in MEASURES.items()
        }
        extra = {
            "L_alpha": named["n_layers"] * named["alpha"],
            "passes": 1 + named["sweeps"],
            "questions": len(sums),
        }
        records.append(named | extra | as_columns(**intervals))
    return pd.DataFrame(records)


def _layerwise(errors: pd.DataFrame) -> float:
    rows = errors[(errors["method"] == "layerwise") & (errors["reference"] == "sequential")]
    return float(logit_error(question_sums(rows)).max()) if len(rows) else float("nan")
