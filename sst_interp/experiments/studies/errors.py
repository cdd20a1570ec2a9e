"""How far are a few sweeps from the exact states (claim C15), and how fast do they converge?

SST V2 trains on a pass without the blend and one blended pass, and puts the error of that at the order of
alpha squared, 6e-4 to 1.2e-3 (arXiv 2605.00206). `two_pass` measures such states against the exact ones on
given text; here its sums become relative errors, disagreements and losses. Intervals resample questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import GREY, canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    bootstrap_ends,
    cluster_bootstrap,
    nothing,
    questions_words,
    ratio,
)
from sst_interp.errors import Untestable
from sst_interp.experiments.studies.show import (
    POSITION,
    Across,
    add_series,
    finite,
    groups_of,
    interval,
    logarithmic,
    number,
    questions_of,
    spread,
    table,
)
from sst_interp.models.kinds.sst import PAPER_ALPHA

PAPER_ERROR = (6e-4, 1.2e-3)
"""What the paper gives for the error of its two passes: of the order of alpha squared."""
FLOOR = 3e-5
"""Errors below this are rounding of float32, not convergence: they are left out of fits."""
SMALL = 0.5
"""Blends with L * alpha up to this are fitted: beyond it the error nears 1, and no power law can hold."""
CONDITION = ["model", "layers", "n_layers", "alpha"]
"""What names a blend: which model, which layers of it, how many, and their mean weight."""
SCHEDULE = ["groups", "sweeps"]
SUMS = ["error2", "norm2", "relative", "state", "argmax", "kl", "positions", "loss", "loss_exact", "tokens"]
ERROR = "relative error of the logits (L2)"

Totals = Callable[[np.ndarray], np.ndarray]
"""Sums of `SUMS` [..., sum] -> a number for each [...]."""


def _over(top: str, bottom: str, less: str | None = None) -> Totals:
    """One sum (less another one) over a third."""

    def of(totals: np.ndarray) -> np.ndarray:
        above, below = (totals[..., SUMS.index(name)] for name in (top, bottom))
        return ratio(np.stack([above - (totals[..., SUMS.index(less)] if less else 0), below], axis=-1))

    return of


def logit_error(totals: np.ndarray) -> np.ndarray:
    """Relative L2 error of the logits, all positions together: |b - a| / |a|. Totals [..., sum] -> [...]."""
    return np.sqrt(_over("error2", "norm2")(totals))


MEASURES: dict[str, Totals] = {
    "logit_error": logit_error,
    "state_error": _over("state", "positions"),
    "argmax": _over("argmax", "positions"),
    "kl": _over("kl", "positions"),
    "loss_change": _over("loss", "tokens", less="loss_exact"),
    "loss_exact": _over("loss_exact", "tokens"),
}
"""Relative L2 error of the logits (all positions together) and of a layer's output (mean over positions and
layers); share of positions whose most likely token differs; KL divergence of the exact next-token
distribution from the approximate one, nats per position; approximate minus exact loss, and the exact one,
nats per answer token."""


@dataclass(frozen=True, eq=False)
class ApproximationError(Result):
    """Errors of sweeps against exact states. Models, blends and schedules are never pooled."""

    schedules: pd.DataFrame
    """A row per blend and schedule: model, layers, n_layers, alpha, L_alpha (their product), groups, sweeps,
    passes (with the one without the blend), questions, and each of `MEASURES` with `_low` and `_high`."""
    positions: pd.DataFrame
    """The same by bin of positions, in one group: `position` is the first position of a bin."""
    headline: dict[str, Interval]
    """Model -> two-pass logit error, blended in all layers at the alpha nearest the paper's mean."""
    layerwise: float = float("nan")
    """Largest relative logit error of the layerwise solution, which is taken as exact; NaN: not measured."""

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
        """The paper's range, then the two-pass error model by model."""
        sentences = []
        for model, error in self.headline.items():
            row = headline_row(self.schedules, model)
            if row is None:
                continue
            where = f"{model}, alpha {row['alpha']:.3g} in {row['n_layers']} layers"
            sentences.append(
                f"{against_paper(error)} for {where}, {questions_words(error.n_questions)}: two-pass logits "
                f"are {error.text()} off. {row['argmax']:.1%} of the most likely tokens differ; the loss "
                f"changes by {spread(row, 'loss_change', '+.2g')} nats per answer token."
            )
        if np.isfinite(self.layerwise):
            sentences.append(f"The solution taken as exact is {self.layerwise:.1e} from the sequential one.")
        return " ".join(sentences)

    def figure(self) -> go.Figure:
        """Two-pass error by alpha, with the paper's line."""
        figure = self._two_passes("alpha", "alpha, mean over blended layers")
        alphas = _two_pass(self.schedules)["alpha"]
        line = np.geomspace(alphas.min(), alphas.max(), 20)
        figure.add_scatter(
            x=line, y=line**2, mode="lines", name="the paper: alpha squared",
            line={"color": GREY, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """By alpha, by L * alpha, by passes; by position and by groups for every model."""
        by_layers = self._two_passes("L_alpha", "L * alpha (blended layers times alpha)")
        plain = self.schedules[(self.schedules["groups"] == 1) & (self.schedules["layers"] == "all")]
        title, about = "Error by number of passes", f"blend in all layers; {questions_of(plain)}"
        by_passes = _by_passes(title, about, _models(plain))
        drawn = {"by_alpha": self.figure(), "by_layers": by_layers, "by_passes": by_passes}
        for model in self.headline:
            own = self._headline(model, self.positions)
            figure = canvas("Error by position", _about(own), POSITION, f"{ERROR}, log scale")
            named = _named(own[own["position"] > 0], "sweeps", "sweep")
            add_series(figure, "position", "logit_error", named)
            drawn[f"by_position, {model}"] = logarithmic(figure)
            own = self._headline(model, self.schedules)
            if (own["groups"] > 1).any():
                by_groups = _by_passes("Cyclic groups", _about(own), _named(own, "groups", "group"))
                drawn[f"by_groups, {model}"] = by_groups
        return drawn

    def _two_passes(self, x: str, axis: str) -> go.Figure:
        """A line per model and set of layers, on log axes; the band is the paper's range."""
        rows, y = _two_pass(self.schedules), f"{ERROR}, log scale"
        figure = canvas("Error of two passes", questions_of(rows), f"{axis} (log scale)", y)
        figure.add_hrect(
            y0=PAPER_ERROR[0], y1=PAPER_ERROR[1], fillcolor=GREY, opacity=0.25, line_width=0,
            annotation_text="the paper's 6e-4 to 1.2e-3", annotation_position="bottom right",
        )  # fmt: skip
        by = groups_of(rows, ["model", "layers"], sort=False)
        named = {f"{model}, {layers} layers": own for (model, layers), own in by}
        add_series(figure, x, "logit_error", named)
        return logarithmic(figure)

    def _headline(self, model: str, rows: pd.DataFrame) -> pd.DataFrame:
        row = headline_row(self.schedules, model)
        assert row is not None
        return rows[(rows["model"] == model) & (rows["layers"] == "all") & (rows["alpha"] == row["alpha"])]


@dataclass(frozen=True, eq=False)
class Contraction(Result):
    """Convergence of sweeps.

    The error after k sweeps is fitted by E(k) = E * c^k: c is the contraction per sweep. Over several blends
    of one backbone the two-pass error is fitted by E = C * alpha^p * L^q, with L the number of layers that
    blend. The paper has p = 2 and q = 0; an error that depends on L * alpha alone has p = q.
    """

    rates: pd.DataFrame
    """A row per blend and number of groups: model, layers, n_layers, alpha, L_alpha, groups, questions,
    `factor` (by which the error shrinks per sweep) with `factor_low` and `factor_high`, and `sweeps`, those
    it was fitted to. NaN where fewer than two errors are above rounding."""
    exponents: pd.DataFrame
    """A row per model with enough blends: blends, questions, `of_alpha` (p) and `of_layers` (q) with their
    ends, and `difference` p - q."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Contraction of sweeps"

    @property
    def table(self) -> pd.DataFrame:
        """A row per blend and number of groups."""
        return self.rates

    @property
    def verdict(self) -> str:
        """The exponents of alpha and of the layer count, and the contraction at the ends of the range."""
        sentences = [self._law(row) for row in self.exponents.to_dict("records")]
        if not sentences:
            sentences.append("Exponents are not testable: too few blends of one backbone.")
        plain = self.rates[(self.rates["groups"] == 1) & self.rates["factor"].notna()]
        for model, rows in plain.groupby("model"):
            by_reach = rows.sort_values("L_alpha", kind="stable").to_dict("records")
            ends = [by_reach[0], by_reach[-1]]
            said = [f"{row_interval(r, 'factor').text()} at L * alpha = {r['L_alpha']:.2g}" for r in ends]
            left = " and ".join(dict.fromkeys(said))
            sentences.append(f"{model}: a sweep leaves {left} of the error.")
        return " ".join(sentences)

    def _law(self, row: dict[Any, Any]) -> str:
        p, q, d = (row_interval(row, name) for name in ("of_alpha", "of_layers", "difference"))
        words = ""
        if p.known:
            squared = q.low <= 0 <= q.high and p.low <= 2 <= p.high
            words = f"Order alpha^2 whatever the layers {'is not refuted' if squared else 'does not hold'}"
            alone = d.low <= 0 <= d.high
            words += f"; L * alpha alone {'is not refuted' if alone else 'does not hold exactly'}. "
        return (
            f"{words}{row['model']}, {questions_words(row['questions'])}, {row['blends']} blends with "
            f"L * alpha up to {SMALL:g}: the two-pass error grows as alpha^{p.text()} L^{q.text()}."
        )

    def figure(self) -> go.Figure:
        """Contraction per sweep by L * alpha. Raises Untestable if too few errors are above rounding."""
        rows = self.rates[self.rates["factor"].notna()]
        if rows.empty:
            raise Untestable("too few errors are above rounding")
        x = "L * alpha (blended layers times alpha, log scale)"
        figure = canvas("Contraction per sweep", questions_of(rows), x, "share of the error left by a sweep")
        named = {
            f"{model}, {words}": own
            for model, rows_of in rows.groupby("model")
            for words, own in _named(rows_of, "groups", "group").items()
        }
        add_series(figure, "L_alpha", "factor", named, joined=False)
        figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
        return figure.update_xaxes(type="log").update_yaxes(rangemode="tozero")


def approximation_error(
    errors: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> ApproximationError:
    """The errors of every blend and schedule in the table of the study `two-pass`.

    Rows that are not finite are left out. Raises Untestable without a two-pass error, blended in all layers.
    """
    errors, sweeps = _of_sweeps(errors)
    schedules = _measured(sweeps, [*CONDITION, *SCHEDULE], resamples, seed)
    positions = _measured(sweeps[sweeps["groups"] == 1], [*CONDITION, *SCHEDULE, "position"], resamples, seed)
    rows = {model: headline_row(schedules, model) for model in schedules["model"].unique()}
    headline = {model: row_interval(row, "logit_error") for model, row in rows.items() if row is not None}
    if not headline:
        raise Untestable("no two-pass error with the blend in all layers was measured")
    check = errors[(errors["method"] == "layerwise") & (errors["reference"] == "sequential")]
    layerwise = float(logit_error(question_sums(check)).max()) if len(check) else float("nan")
    return ApproximationError(schedules, positions, headline, layerwise)


def contraction(errors: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Contraction:
    """Contraction per sweep of every blend, and the exponents of the two-pass error, from the same table.

    Raises Untestable without an error of sweeps.
    """
    _, rows = _of_sweeps(errors)
    rates = [
        _rate(own, dict(zip([*CONDITION, "groups"], names, strict=True)), resamples, seed)
        for names, own in groups_of(rows, [*CONDITION, "groups"])
    ]
    fits = [_fit(str(model), own, resamples, seed) for model, own in _two_pass(rows).groupby("model")]
    return Contraction(pd.DataFrame(rates), pd.DataFrame([fit for fit in fits if fit]))


def question_sums(rows: pd.DataFrame) -> np.ndarray:
    """The sums of `SUMS` per question, [question, sum]."""
    return rows.groupby("question")[SUMS].sum().to_numpy(dtype=float)


def headline_row(schedules: pd.DataFrame, model: str) -> pd.Series | None:
    """A model's two-pass row, blended in all layers at the alpha nearest the paper's mean, or None."""
    rows = _two_pass(schedules[(schedules["model"] == model) & (schedules["layers"] == "all")])
    return None if rows.empty else rows.loc[(rows["alpha"] - PAPER_ALPHA).abs().idxmin()]


def row_interval(row: Mapping[Any, Any] | pd.Series, name: str) -> Interval:
    """The interval in a table's row: `name`, `name_low`, `name_high`, and how many `questions`."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    reason = None if np.isfinite(low) else "one question"
    return Interval(value, low, high, int(row["questions"]), reason=reason)


def against_paper(error: Interval) -> str:
    """Whether the paper's range for a two-pass error holds, in words."""
    low, high = PAPER_ERROR
    said = "holds" if error.high <= high else "is not decided"
    if not error.known or error.low > high:
        said = "does not hold" if error.known else "is not testable"
    return f"The paper's {low:g} to {high:g} {said}"


def by_question(rows: pd.DataFrame, axis: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Sums [question, member, sum] and the members [member], one per value of `axis`. Members that fewer
    questions have than others (an interrupted measurement) are left out, then questions that lack one.
    """
    sums: Any = rows.groupby(["question", *axis])[SUMS].sum().unstack(axis)
    have = sums["error2"].notna().sum()
    kept = have.index[have == have.max()]
    parts = [sums[name][kept] for name in SUMS]
    whole = parts[0].notna().all(axis=1)
    values = np.stack([part[whole].to_numpy(dtype=float) for part in parts], axis=-1)
    return values, kept.to_frame(index=False)


def slopes(design: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares coefficients without the constant: design [member, k], y [..., member] -> [..., k]."""
    centred = design - design.mean(axis=0)
    return (y - y.mean(axis=-1, keepdims=True)) @ np.linalg.pinv(centred).T


def _of_sweeps(errors: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(every finite row, those that compare sweeps with the layerwise solution)."""
    if errors.empty:
        raise Untestable("the table of errors is empty")
    errors = finite(errors, SUMS)
    rows = errors[(errors["method"] == "sweeps") & (errors["reference"] == "layerwise")]
    if rows.empty:
        raise Untestable("no error of sweeps against exact states was measured")
    return errors, rows


def _measured(rows: pd.DataFrame, by: Sequence[str], resamples: int, seed: int) -> pd.DataFrame:
    """A row per group of `by` with every measure."""

    def measures(totals: np.ndarray) -> np.ndarray:
        return np.stack([of(totals) for of in MEASURES.values()], axis=-1)

    records = []
    for names, own in groups_of(rows, by):
        named, sums = dict[str, Any](zip(by, names, strict=True)), question_sums(own)
        extra = {"L_alpha": named["n_layers"] * named["alpha"], "passes": 1 + named["sweeps"]}
        values, low, high = bootstrap_ends(sums, measures, resamples, seed=seed)
        record = named | extra | {"questions": len(sums)}
        for name, *ends in zip(MEASURES, values, low, high, strict=True):
            record |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        records.append(record)
    return pd.DataFrame(records)


def _rate(rows: pd.DataFrame, named: dict, resamples: int, seed: int) -> dict:
    """The contraction per sweep of one blend and number of groups, and the sweeps that it is fitted to."""
    sums, members = by_question(rows, ["sweeps"])
    above = logit_error(sums.sum(axis=0)) > FLOOR if len(sums) else np.zeros(len(members), dtype=bool)
    sweeps = members["sweeps"].to_numpy(dtype=float)[above]
    rate, fitted = nothing("too few errors above rounding"), ""
    if len(sweeps) >= 2:

        def factor(totals: np.ndarray) -> np.ndarray:
            return np.exp(slopes(sweeps[:, None], np.log(logit_error(totals)))[..., 0])

        rate = cluster_bootstrap(sums[:, above], factor, resamples, seed=seed)
        fitted = ", ".join(f"{k:g}" for k in sweeps)
    extra = {"L_alpha": named["n_layers"] * named["alpha"], "questions": len(sums)}
    return named | extra | as_columns(factor=rate) | {"sweeps": fitted}


def _fit(model: str, rows: pd.DataFrame, resamples: int, seed: int) -> dict | None:
    """Exponents of one model's two-pass error; None unless alpha and L both vary, independently."""
    rows = rows[rows["n_layers"] * rows["alpha"] <= SMALL]
    if rows.empty:
        return None
    sums, members = by_question(rows, CONDITION)
    design = np.log(members[["alpha", "n_layers"]].to_numpy(dtype=float))
    if len(sums) == 0 or len(members) < 4 or np.linalg.matrix_rank(design - design.mean(axis=0)) < 2:
        return None

    def exponent(of: Callable[[np.ndarray], np.ndarray]) -> Interval:
        statistic = lambda totals: of(slopes(design, np.log(logit_error(totals))))  # noqa: E731
        return cluster_bootstrap(sums, statistic, resamples, seed=seed)

    p, q = exponent(lambda fitted: fitted[..., 0]), exponent(lambda fitted: fitted[..., 1])
    difference = exponent(lambda fitted: fitted[..., 0] - fitted[..., 1])
    row = {"model": model, "blends": len(members), "questions": len(sums)}
    return row | as_columns(of_alpha=p, of_layers=q, difference=difference)


def two_pass(result: ApproximationError) -> str:
    """A row per model and blend."""
    columns = {
        "model": "model", "layers": "layers", "alpha": "alpha", "L * alpha": "L_alpha",
        "questions": "questions", "logits": interval("logit_error"), "states": interval("state_error"),
        "argmax differs": number("argmax", ".1%"), "KL, nats": "kl",
        "loss change, nats": interval("loss_change", "+.2g"), "exact loss": "loss_exact",
        "alpha^2": lambda row: f"{row['alpha'] ** 2:.1e}",
    }  # fmt: skip
    return table(_two_pass(result.schedules), columns)


PASSES = {"{} passes": Across("passes", interval("logit_error"))}


def by_sweeps(result: ApproximationError) -> str:
    """Error of the logits by number of passes, blend in all layers."""
    rows = result.schedules
    rows = rows[(rows["groups"] == 1) & (rows["layers"] == "all")]
    return table(rows.sort_values("passes", kind="stable"), {"model": "model", "alpha": "alpha"} | PASSES)


def by_groups(result: ApproximationError) -> str:
    """The same in cyclic groups, of the blends that were measured in several numbers of groups."""
    rows = result.schedules
    of = rows.groupby(["model", "alpha", "layers"])["groups"].transform("nunique")
    most = rows.loc[rows["groups"] > 1, "sweeps"].max()
    rows = rows[(of > 1) & (rows["sweeps"] <= most)].sort_values("passes", kind="stable")
    return table(rows, {"model": "model", "alpha": "alpha", "groups": "groups"} | PASSES)


def rates_table(result: Contraction) -> str:
    """A row per blend and number of groups."""
    columns = {
        "model": "model", "layers": "layers", "alpha": "alpha", "L * alpha": "L_alpha", "groups": "groups",
        "left by a sweep": interval("factor"),
    }  # fmt: skip
    return table(result.rates[result.rates["factor"].notna()], columns)


def _two_pass(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]


def _about(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    blend = f"{first['model']}, alpha {first['alpha']:.3g} in {first['n_layers']} layers"
    return f"{blend}; {questions_of(rows)}"


def _by_passes(title: str, about: str, named: Mapping[str, pd.DataFrame]) -> go.Figure:
    x = "passes over all positions (the first without the blend)"
    figure = canvas(title, about, x, f"{ERROR}, log scale")
    add_series(figure, "passes", "logit_error", named)
    return figure.update_yaxes(type="log", exponentformat="power")


def _models(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    several = rows.groupby("model")["alpha"].nunique() > 1
    by = groups_of(rows, ["model", "alpha"])
    return {f"{m}, alpha {alpha:g}" if several[m] else str(m): own for (m, alpha), own in by}


def _named(rows: pd.DataFrame, by: str, noun: str) -> dict[str, pd.DataFrame]:
    return {f"{k} {noun}{'s' * (k > 1)}": own for (k,), own in groups_of(rows, [by])}
