"""How far are a few sweeps from the exact states (claim C15), and how fast do they converge?

SST V2 trains on a pass without the blend and one blended pass, and puts the error of that at the order of
alpha squared, 6e-4 to 1.2e-3 (arXiv 2605.00206). `two_pass` measures such solutions against the exact
ones on given text; here its sums become relative errors, disagreements and losses. Intervals resample
questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)
from sst_interp.errors import Untestable

PAPER_ERROR = (6e-4, 1.2e-3)
"""What the paper gives for the error of its two passes: of the order of alpha squared."""
PAPER_ALPHA = 0.027
"""Mean of the paper's learned blend weights."""
FLOOR = 3e-5
"""Errors below this are rounding of float32, not convergence: they are left out of fits."""
SMALL = 0.5
"""Blends with L * alpha up to this are fitted: beyond it the error nears 1, and no power law can hold."""

CONDITION = ["model", "layers", "n_layers", "alpha"]
"""What names a blend: which model, which layers of it, how many, and their mean weight."""
SCHEDULE = ["groups", "sweeps"]
SUMS = ["error2", "norm2", "relative", "state", "argmax", "kl", "positions", "loss", "loss_exact", "tokens"]
_AT = {name: index for index, name in enumerate(SUMS)}
NO_SWEEPS = "no error of sweeps against exact states was measured"


def logit_error(totals: np.ndarray) -> np.ndarray:
    """Relative L2 error of the logits, all positions together: |b - a| / |a|. Totals [..., sum] -> [...]."""
    return np.sqrt(_over(totals, "error2", "norm2"))


def _over(totals: np.ndarray, top: str, bottom: str, less: str | None = None) -> np.ndarray:
    above = totals[..., _AT[top]] - (totals[..., _AT[less]] if less else 0)
    return ratio(np.stack([above, totals[..., _AT[bottom]]], axis=-1))


MEASURES = {
    "logit_error": logit_error,
    "state_error": lambda totals: _over(totals, "state", "positions"),
    "argmax": lambda totals: _over(totals, "argmax", "positions"),
    "kl": lambda totals: _over(totals, "kl", "positions"),
    "loss_change": lambda totals: _over(totals, "loss", "tokens", less="loss_exact"),
    "loss_exact": lambda totals: _over(totals, "loss_exact", "tokens"),
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
    passes (sweeps and the pass without the blend), questions, and each of `MEASURES` with `_low` and
    `_high`."""
    positions: pd.DataFrame
    """The same by bin of positions, in one group: `position` is the first position of a bin."""
    headline: dict[str, Interval]
    """Model -> two-pass logit error, blended in all layers at the alpha nearest the paper's mean."""
    layerwise: float = float("nan")
    """Largest relative logit error of the layerwise solution, which is taken as exact, against the sequential
    one; NaN if none was measured."""

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
            change = signed(row_interval(row, "loss_change"))
            sentences.append(
                f"{against_paper(error)} for {where}, {questions_words(error.n_questions)}: two-pass logits "
                f"are {error.text()} off. {row['argmax']:.1%} of the most likely tokens differ; the loss "
                f"changes by {change} nats per answer token."
            )
        if np.isfinite(self.layerwise):
            sentences.append(f"The solution taken as exact is {self.layerwise:.1e} from the sequential one.")
        return " ".join(sentences)

    def figure(self) -> go.Figure:
        """Two-pass error by alpha, with the paper's line."""
        return self._by_alpha("alpha", "alpha, mean over blended layers")

    def figures(self) -> dict[str, go.Figure]:
        """By alpha, by L * alpha, by passes; by position and by groups for every model."""
        drawn = {
            "by_alpha": self.figure(),
            "by_layers": self._by_alpha("L_alpha", "L * alpha (blended layers times alpha)"),
        }
        plain = self.schedules[(self.schedules["groups"] == 1) & (self.schedules["layers"] == "all")]
        drawn["by_passes"] = self._by_passes(
            "Error by number of passes", f"blend in all layers; {questions_of(plain)}", plain, _models(plain)
        )
        for model in self.headline:
            own = self._headline(model, self.positions)
            own = own[own["position"] > 0]
            figure = canvas("Error by position", self._about(own), POSITION, f"{ERROR}, log scale")
            add_series(figure, "position", "logit_error", _named(own, "sweeps", "sweep"))
            drawn[f"by_position, {model}"] = logarithmic(figure)
            own = self._headline(model, self.schedules)
            if (own["groups"] > 1).any():
                named = _named(own, "groups", "group")
                drawn[f"by_groups, {model}"] = self._by_passes("Cyclic groups", self._about(own), own, named)
        return drawn

    def _by_alpha(self, x: str, axis: str) -> go.Figure:
        """A line per model and set of layers, on log axes; the band is the paper's range."""
        rows = self.schedules[(self.schedules["groups"] == 1) & (self.schedules["sweeps"] == 1)]
        figure = canvas(
            "Error of two passes", questions_of(rows), f"{axis} (log scale)", f"{ERROR}, log scale"
        )
        figure.add_hrect(
            y0=PAPER_ERROR[0], y1=PAPER_ERROR[1], fillcolor=GREY, opacity=0.25, line_width=0,
            annotation_text="the paper's 6e-4 to 1.2e-3", annotation_position="bottom right",
        )  # fmt: skip
        if x == "alpha":
            line = np.geomspace(rows["alpha"].min(), rows["alpha"].max(), 20)
            figure.add_scatter(
                x=line, y=line**2, mode="lines", name="the paper: alpha squared",
                line={"color": GREY, "dash": "dash"}, hoverinfo="skip",
            )  # fmt: skip
        named = {f"{m}, {layers} layers": own for (m, layers), own in rows.groupby(CONDITION[:2], sort=False)}
        add_series(figure, x, "logit_error", named)
        return logarithmic(figure)

    def _by_passes(
        self, title: str, about: str, rows: pd.DataFrame, named: Mapping[str, pd.DataFrame]
    ) -> go.Figure:
        x = "passes over all positions (the first without the blend)"
        figure = canvas(title, about, x, f"{ERROR}, log scale")
        add_series(figure, "passes", "logit_error", named)
        figure.update_yaxes(type="log", exponentformat="power")
        return figure

    def _headline(self, model: str, rows: pd.DataFrame) -> pd.DataFrame:
        row = headline_row(self.schedules, model)
        assert row is not None
        return rows[(rows["model"] == model) & (rows["layers"] == "all") & (rows["alpha"] == row["alpha"])]

    def _about(self, rows: pd.DataFrame) -> str:
        first = rows.iloc[0]
        blend = f"{first['model']}, alpha {first['alpha']:.3g} in {first['n_layers']} layers"
        return f"{blend}; {questions_of(rows)}"


@dataclass(frozen=True, eq=False)
class Contraction(Result):
    """Convergence of sweeps.

    The error after k sweeps is fitted by E(k) = E * c^k: c is the contraction per sweep. Over several blends
    of one backbone the two-pass error is fitted by E = C * alpha^p * L^q, with L the number of layers that
    blend. The paper's order of alpha squared is p = 2 and q = 0; an error that depends on L * alpha alone has
    p = q.
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
            blends = rows.to_dict("records")
            ends = [pick(blends, key=lambda row: row["L_alpha"]) for pick in (min, max)]
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
        """Contraction per sweep by L * alpha.

        Raises:
            Untestable: too few errors are above rounding.
        """
        rows = self.rates[self.rates["factor"].notna()]
        if rows.empty:
            raise Untestable("too few errors are above rounding")
        x = "L * alpha (blended layers times alpha, log scale)"
        figure = canvas("Contraction per sweep", questions_of(rows), x, "share of the error left by a sweep")
        by: Any = rows.groupby(["model", "groups"])
        named = {f"{model}, {groups} group{'s' * (groups > 1)}": own for (model, groups), own in by}
        add_series(figure, "L_alpha", "factor", named, joined=False)
        figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
        figure.update_xaxes(type="log")
        figure.update_yaxes(rangemode="tozero")
        return figure


def approximation_error(
    errors: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> ApproximationError:
    """The errors of every blend and schedule in the table of the study `two-pass`.

    Args:
        errors: a row per (blend, schedule, question, bin of positions). Rows that are not finite are left
            out.
        resamples: question resamples.
        seed: of the resampling.

    Raises:
        Untestable: no two-pass error with the blend in all layers was measured.
    """
    errors = _finite(errors)
    sweeps = _sweeps(errors)
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
    """Contraction per sweep of every blend, and the exponents of the two-pass error.

    Args:
        errors: as in `approximation_error`.
        resamples: question resamples.
        seed: of the resampling.

    Raises:
        Untestable: no error of sweeps was measured.
    """
    rows = _sweeps(_finite(errors))
    rates = [
        _rate(own, dict(zip([*CONDITION, "groups"], names, strict=True)), resamples, seed)
        for names, own in rows.groupby([*CONDITION, "groups"], sort=True)
    ]
    two_pass = rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]
    fits = [_fit(str(model), own, resamples, seed) for model, own in two_pass.groupby("model")]
    return Contraction(pd.DataFrame(rates), pd.DataFrame([fit for fit in fits if fit]))


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


def against_paper(error: Interval) -> str:
    """Whether the paper's range for a two-pass error holds, in words."""
    low, high = PAPER_ERROR
    words = f"The paper's {low:g} to {high:g}"
    if not error.known:
        return f"{words} is not testable"
    if error.low > high:
        return f"{words} does not hold"
    return f"{words} holds" if error.high <= high else f"{words} is not decided"


def signed(interval: Interval) -> str:
    """`+0.41 [+0.3, +0.5]`."""
    ends = f" [{interval.low:+.2g}, {interval.high:+.2g}]" if interval.known else ""
    return f"{interval.estimate:+.2g}{ends}"


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


def _finite(errors: pd.DataFrame) -> pd.DataFrame:
    if errors.empty:
        raise Untestable("the table of errors is empty")
    return errors.loc[np.isfinite(errors[SUMS].to_numpy(dtype=float)).all(axis=1)]


def _sweeps(errors: pd.DataFrame) -> pd.DataFrame:
    rows = errors[(errors["method"] == "sweeps") & (errors["reference"] == "layerwise")]
    if rows.empty:
        raise Untestable(NO_SWEEPS)
    return rows


def _measured(rows: pd.DataFrame, by: Sequence[str], resamples: int, seed: int) -> pd.DataFrame:
    """A row per group of `by` with every measure."""
    records = []
    for names, own in rows.groupby(list(by), sort=True):
        sums = question_sums(own)
        named = dict[str, Any](zip(by, names, strict=True))
        intervals = {
            name: cluster_bootstrap(sums, measure, resamples, seed=seed) for name, measure in MEASURES.items()
        }
        extra = {"L_alpha": named["n_layers"] * named["alpha"], "passes": 1 + named["sweeps"]}
        records.append(named | extra | {"questions": len(sums)} | as_columns(**intervals))
    return pd.DataFrame(records)


def _rate(rows: pd.DataFrame, named: dict, resamples: int, seed: int) -> dict:
    sums, members = by_question(rows, ["sweeps"])
    sweeps = members["sweeps"].to_numpy(dtype=float)
    above = logit_error(sums.sum(axis=0)) > FLOOR if len(sums) else np.zeros(len(sweeps), dtype=bool)
    rate = Interval(np.nan, np.nan, np.nan, 0, reason="too few errors above rounding")
    if above.sum() >= 2:
        design = sweeps[above][:, None]

        def factor(totals: np.ndarray) -> np.ndarray:
            return np.exp(slopes(design, np.log(logit_error(totals)))[..., 0])

        rate = cluster_bootstrap(sums[:, above], factor, resamples, seed=seed)
    extra = {"L_alpha": named["n_layers"] * named["alpha"], "questions": len(sums)}
    fitted = ", ".join(f"{k:g}" for k in sweeps[above]) if above.sum() >= 2 else ""
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

    def exponents(index: int):
        def of(totals: np.ndarray) -> np.ndarray:
            fitted = slopes(design, np.log(logit_error(totals)))
            return fitted[..., index] if index < 2 else fitted[..., 0] - fitted[..., 1]

        return of

    p, q, d = (cluster_bootstrap(sums, exponents(i), resamples, seed=seed) for i in range(3))
    row = {"model": model, "blends": len(members), "questions": len(sums)}
    return row | as_columns(of_alpha=p, of_layers=q, difference=d)


COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
ERROR = "relative error of the logits (L2)"
POSITION = "position in the text, first of its bin (0-based; log scale from 1)"


def add_series(
    figure: go.Figure, x: str, y: str, named: Mapping[str, pd.DataFrame], joined: bool = True
) -> None:
    """A line with bars for the 95% intervals per entry; errors of exactly 0 have no place on a log axis."""
    for (name, own), colour, symbol in zip(named.items(), cycle(COLOURS), cycle(SYMBOLS), strict=False):
        own = own[own[y] > 0].sort_values(x)
        values, low, high = (own[c].to_numpy(dtype=float) for c in (y, f"{y}_low", f"{y}_high"))
        figure.add_scatter(
            x=own[x], y=values, mode="lines+markers" if joined and len(own) > 1 else "markers", name=name,
            line={"color": colour, "width": 2}, marker={"color": colour, "symbol": symbol, "size": 8},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": np.nan_to_num(high - values), "arrayminus": np.nan_to_num(values - low),
            },
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"{name}<br>%{{x:.3g}}: %{{y:.2g}} [%{{customdata[0]:.2g}}, %{{customdata[1]:.2g}}]"
            "<extra></extra>",
        )  # fmt: skip
    legend = 14 * -(-len(named) // 2)
    figure.update_layout(margin={"t": 95 + legend}, height=400 + legend)


def logarithmic(figure: go.Figure) -> go.Figure:
    """The figure on two log axes."""
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def questions_of(rows: pd.DataFrame) -> str:
    """How many questions the rows are of, and what the bars are."""
    low, high = int(rows["questions"].min()), int(rows["questions"].max())
    words = questions_words(high) if low == high else f"{low} to {questions_words(high)}"
    return f"{words}; bars: 95%, questions resampled"


def _models(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    of_model = rows.groupby("model")["alpha"].nunique()
    by: Any = rows.groupby(["model", "alpha"])
    return {
        f"{model}, alpha {alpha:g}" if of_model[model] > 1 else f"{model}": own for (model, alpha), own in by
    }


def _named(rows: pd.DataFrame, by: str, noun: str) -> dict[str, pd.DataFrame]:
    groups: Any = rows.groupby(by)
    return {f"{k} {noun}{'s' * (k > 1)}": own for k, own in groups}
