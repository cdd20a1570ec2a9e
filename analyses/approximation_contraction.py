"""How fast sweeps converge, and on what their error depends: on alpha, or on how many layers blend?

The error after k sweeps is fitted by E(k) = E * c^k: c is the contraction per sweep. Over several blends of
one backbone the two-pass error is fitted by E = C * alpha^p * L^q, with L the number of layers that blend.
The paper's order of alpha squared is p = 2 and q = 0; an error that depends on L * alpha alone has p = q.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.approximation import CONDITION, SUMS, logit_error, row_interval
from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.figures import approximation as approximation_figures
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, as_columns, cluster_bootstrap, questions_words

FLOOR = 3e-5
"""Errors below this are rounding of float32, not convergence: they are left out of fits."""
SMALL = 0.5
"""Blends with L * alpha up to this are fitted: beyond it the error nears 1, and no power law can hold."""


@dataclass(frozen=True, eq=False)
class Contraction(Result):
    """Convergence of sweeps; intervals resample questions."""

    rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per blend and number of groups: model, layers, n_layers, alpha, L_alpha, groups, questions,
    `factor` (by which the error shrinks per sweep) with `factor_low` and `factor_high`, and `sweeps`, those
    it was fitted to. NaN where fewer than two errors are above rounding."""
    exponents: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per model with enough blends: blends, questions, `of_alpha` (p) and `of_layers` (q) with their
    ends, and `difference` p - q."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

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
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        parts = []
        for row in self.exponents.to_dict("records"):
            p, q, d = (row_interval(row, name) for name in ("of_alpha", "of_layers", "difference"))
            words = (
                f"{row['model']}: the two-pass error grows as alpha^{p.text()} L^{q.text()} "
                f"({row['blends']} blends with L * alpha up to {SMALL:g}, "
                f"{questions_words(row['questions'])})"
            )
            if p.known:
                words += "; order alpha^2 whatever the layers "
                words += (
                    "is not refuted" if q.low <= 0 <= q.high and p.low <= 2 <= p.high else "does not hold"
                )
                one = "is not refuted" if d.low <= 0 <= d.high else "does not hold exactly"
                words += f"; L * alpha alone (equal exponents) {one}"
            parts.append(words)
        if not parts:
            parts.append("exponents are not testable: too few blends of one backbone")
        plain = self.rates[(self.rates["groups"] == 1) & self.rates["factor"].notna()]
        for model, rows in plain.groupby("model"):
            ends = [rows.loc[rows["L_alpha"].idxmin()], rows.loc[rows["L_alpha"].idxmax()]]
            said = [f"{row_interval(r, 'factor').text()} at L * alpha = {r['L_alpha']:.2g}" for r in ends]
            parts.append(f"{model}: a sweep leaves " + " and ".join(dict.fromkeys(said)) + " of the error")
        return ". ".join(parts) + "."

    def figure(self) -> go.Figure:
        """Contraction per sweep by L * alpha."""
        return approximation_figures.contraction(self)


def contraction(errors: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> Contraction:
    """Contraction per sweep of every blend, and the exponents of the two-pass error.

    Args:
        errors: as in `approximation.approximation_error`.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; one whose verdict begins "not testable:" if no error of sweeps was measured.
    """
    if errors.empty:
        return Contraction(not_testable="the table of errors is empty")
    finite = np.isfinite(errors[SUMS].to_numpy(dtype=float)).all(axis=1)
    rows = errors[finite & (errors["method"] == "sweeps") & (errors["reference"] == "layerwise")]
    if rows.empty:
        return Contraction(not_testable="no error of sweeps against exact states was measured")
    rates = [
        _rate(own, dict(zip([*CONDITION, "groups"], names, strict=True)), resamples, seed)
        for names, own in rows.groupby([*CONDITION, "groups"], sort=True)
    ]
    found = Contraction(rates=pd.DataFrame(rates))
    two_pass = rows[(rows["groups"] == 1) & (rows["sweeps"] == 1)]
    fits = [
        fit for model, own in two_pass.groupby("model") if (fit := _fit(str(model), own, resamples, seed))
    ]
    return replace(found, exponents=pd.DataFrame(fits))


def by_question(rows: pd.DataFrame, axis: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Sums [question, member, sum] and the members [member], one per value of `axis`. Members that fewer
    questions have than others (an interrupted measurement) are left out, then questions that lack one.
    """
    sums = rows.groupby(["question", *axis])[SUMS].sum().unstack(axis)
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


def _rate(rows: pd.DataFrame, named: dict, resamples: int, seed: int) -> dict:
    sums, members = by_question(rows, ["sweeps"])
    sweeps = members["sweeps"].to_numpy(dtype=float)
    above = logit_error(sums.sum(axis=0)) > FLOOR if len(sums) else np.zeros(len(sweeps), dtype=bool)
    rate = UNKNOWN
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
            found = slopes(design, np.log(logit_error(totals)))
            return found[..., index] if index < 2 else found[..., 0] - found[..., 1]

        return of

    p, q, d = (cluster_bootstrap(sums, exponents(i), resamples, seed=seed) for i in range(3))
    row = {"model": model, "blends": len(members), "questions": len(sums)}
    return row | as_columns(of_alpha=p, of_layers=q, difference=d)
