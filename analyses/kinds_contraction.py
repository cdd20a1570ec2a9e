"""Contraction per sweep of each kind of model: by which factor does a parallel sweep shrink what is left?

The residual after k sweeps is fitted by r(k) = r * c^k on each text; c is the geometric mean over texts, and
its interval resamples texts (a text is a question).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import plots as intervals
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)


@dataclass(frozen=True, eq=False)
class KindsContraction(Result):
    """The factor by which a sweep shrinks the residual, by run and depth."""

    rates: pd.DataFrame
    """A row per run and depth: run, depth, texts, `factor` with `factor_low` and `factor_high` (NaN where
    nothing is left after the first sweep), `sweeps` (median, of the texts that settled), `settled` (texts
    with a residual below the tolerance), `at_once` (after the first sweep), `residual` (median, the last)."""
    curves: pd.DataFrame
    """Columns run, depth, sweep, residual (median over texts), texts."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Contraction per sweep"

    @property
    def table(self) -> pd.DataFrame:
        """A row per run and depth."""
        return self.rates

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it."""
        return [
            {
                "run": str(row["run"]),
                "depth": str(row["depth"]),
                "texts": str(row["texts"]),
                "factor per sweep": _factor(row),
                "settled": f"{row['settled']} of {row['texts']}",
                "sweeps until then": "" if np.isnan(row["sweeps"]) else f"{row['sweeps']:g}",
                "residual after the last": f"{row['residual']:.1g}",
            }
            for row in self.rates.to_dict("records")
        ]

    @property
    def verdict(self) -> str:
        """The factors, with what does not contract said first."""
        if self.rates.empty:
            return "not testable: no sweeps were measured."
        said = [
            f"{row['run']} at depth {row['depth']}: {_factor(row)}" for row in self.rates.to_dict("records")
        ]
        n = questions_words(int(self.rates["texts"].max()))
        return f"A sweep leaves of the residual, on texts of {n}: " + "; ".join(said) + "."

    def figure(self) -> go.Figure:
        """Residual by sweep, on a log axis."""
        nothing = np.nan
        series = [
            intervals.Line(
                f"{run}, depth {depth}",
                own["sweep"],
                own["residual"],
                np.full(len(own), nothing),
                np.full(len(own), nothing),
            )
            for (run, depth), own in self.curves.groupby(["run", "depth"], sort=False)
        ]
        n = int(self.rates["texts"].max()) if len(self.rates) else 0
        figure = intervals.lines(
            "What is left after each sweep",
            f"median over texts of {questions_words(n)}; a curve ends where half of them have settled",
            "sweep",
            "largest relative change of a state (log scale)",
            series,
        )
        figure.update_yaxes(type="log")
        return figure


def kinds_contraction(
    residuals: Mapping[str, pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0
) -> KindsContraction:
    """Factors from residuals.

    Args:
        residuals: by run, rows as `sst_interp.contraction.sweep_residuals` returns them.
        resamples: text resamples.
        seed: of the resampling.
    """
    rates, curves = [], []
    for run, rows in residuals.items():
        for depth, own in rows.groupby("depth", sort=True):
            rates.append({"run": run, "depth": depth, **_rate(own, resamples, seed)})
            counts = own[own["residual"] > 0].groupby("sweep")["residual"].agg(["median", "count"])
            enough = counts[counts["count"] * 2 >= own["text"].nunique()].reset_index()
            curves.append(
                enough.rename(columns={"median": "residual", "count": "texts"}).assign(run=run, depth=depth)
            )
    return KindsContraction(pd.DataFrame(rates), pd.concat(curves) if curves else pd.DataFrame())


def _rate(rows: pd.DataFrame, resamples: int, seed: int) -> dict[str, object]:
    """One run at one depth."""
    last = rows.sort_values("sweep").groupby("text").tail(1)
    settled = last[last["settled"].to_numpy(dtype=bool)]
    from sst_interp.experiments.studies.errors import slopes

    logs = [
        float(slopes(own["sweep"].to_numpy(dtype=float)[:, None], np.log(own["residual"].to_numpy()))[0])
        for _, own in rows[rows["residual"] > 0].groupby("text")
        if len(own) > 1
    ]
    sums = np.array([[slope, 1.0] for slope in logs]).reshape(-1, 2)
    factor = cluster_bootstrap(sums, lambda totals: np.exp(ratio(totals)), resamples, seed=seed)
    return {
        "texts": rows["text"].nunique(),
        **as_columns(factor=factor),
        "sweeps": float(settled["sweep"].median()) if len(settled) else float("nan"),
        "settled": len(settled),
        "at_once": int((settled["sweep"] == 1).sum()),
        "residual": float(last["residual"].median()),
    }


def _factor(row: Mapping[Any, Any]) -> str:
    """A factor in words."""
    if row["at_once"] == row["texts"]:
        return "nothing is left after the first"
    found = Interval(row["factor"], row["factor_low"], row["factor_high"], row["texts"])
    return found.text() if np.isfinite(found.low) else f"{found.estimate:.3g}"
