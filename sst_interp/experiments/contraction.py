"""Contraction: by which factor does a parallel sweep shrink the residual, in each kind of model?

A sweep is a parallel pass over all positions and iterations (`sst_interp.models.solvers.sweeps`). With a
factor below 1 all positions converge together; else each sweep makes one more position exact. The residual
after k sweeps is fitted by r(k) = r * c^k on each text. The factor is the geometric mean of c over texts,
and its interval resamples texts (a text is a question).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from tqdm import tqdm

from sst_interp.analyses import plots
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    ratio,
)
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.kinds import SHOWN, open_together
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers.sequential import TOLERANCE
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.runs.provenance import questions_of
from sst_interp.runs.run import Run

COLUMNS = ["text", "tokens", "depth", "sweep", "residual", "settled"]
SWEEPS = 12
"""At most so many: far fewer than positions, after which everything is exact whatever the factor."""
TOKENS = 48
"""How many tokens of each text are read, from its start."""


@dataclass(frozen=True, eq=False)
class KindsContraction(Result):
    """The factor by which a sweep shrinks the residual, by run and depth."""

    rates: pd.DataFrame
    """A row per run and depth: run, depth, texts, `factor` with `factor_low` and `factor_high` (NaN if no
    residual is left after the first sweep), `sweeps` (median of the texts that settled), `settled` (texts
    with a residual below the tolerance), `at_once` (after the first sweep), `residual` (median, the last)."""
    curves: pd.DataFrame
    """Columns run, depth, sweep, residual (median over texts), texts."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
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
        """In how many models and depths a sweep shrinks the residual, and the largest factors."""
        rows = self.rates.to_dict("records")
        shrinks = sum(
            row["at_once"] == row["texts"] or np.fmax(row["factor"], row["factor_high"]) < 1 for row in rows
        )
        words = f"A sweep shrinks the residual in {shrinks} of {len(rows)} models and depths. "
        words += f"Texts of {questions_words(int(self.rates['texts'].max()))}"
        slow = [row for row in rows if row["at_once"] < row["texts"]]
        slow = sorted(slow, key=lambda row: -row["factor"])[:SHOWN]
        factors = ", ".join(f"{row['run']} at depth {row['depth']} {_factor(row)}" for row in slow)
        return f"{words}; the largest factors: {factors}." if slow else f"{words}."

    def figure(self) -> go.Figure:
        """Residual by sweep, on a log axis."""
        series = []
        for (run, depth), own in self.curves.groupby(["run", "depth"], sort=False):
            none = np.full(len(own), np.nan)
            series.append(plots.Line(f"{run}, depth {depth}", own["sweep"], own["residual"], none, none))
        n = questions_words(int(self.rates["texts"].max()))
        figure = plots.lines(
            "The residual after each sweep",
            f"median over texts of {n}; a curve ends where half of them have settled",
            "sweep",
            "largest relative change of a state (log scale)",
            series,
        )
        figure.update_yaxes(type="log")
        return figure


def contraction_of(
    names: Sequence[str | Path], texts: int, resamples: int = RESAMPLES, seed: int = 0
) -> KindsContraction:
    """Contraction per sweep of each run's model, in float32, at depth 1 and the deepest.

    Args:
        names: of runs whose models are measured on the runs' own questions.
        texts: of the first so many questions, without a chat template (all begin alike with one).

    Raises:
        SSTError: no texts, or more than the runs have questions; as `open_together` and `load`.
    """
    residuals = {}
    for run in check_texts(names, texts):
        recipe, depths = run.recipe, sorted({1, max(run.recipe.depths)})
        asked = questions_of(recipe, texts)
        model = load(
            recipe.checkpoint, recipe.alpha, recipe.choices, "float32", kind=recipe.kind, loop=recipe.loop
        )
        read = [model.encode(q.prompt) for q in asked.questions]
        with tqdm(desc=f"sweeps of {run.name}", total=len(read) * len(depths), unit="text") as bar:
            residuals[run.name] = sweep_residuals(model, read, depths, lambda bar=bar: bar.update(1))
    return kinds_contraction(residuals, resamples, seed)


def check_texts(names: Sequence[str | Path], texts: int) -> list[Run]:
    """The runs of `contraction_of`. Raises SSTError unless they have that many questions."""
    if texts < 1:
        raise SSTError(f"{texts} texts are none", "for example --contraction 8")
    runs = open_together(names)
    if texts > (n := runs[0].questions["question"].nunique()):
        raise SSTError(f"{texts} texts are more than the runs' {questions_words(n)}", f"give at most {n}")
    return runs


@torch.no_grad()
def sweep_residuals(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    depths: Sequence[int] = (1, 4),
    each: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """A row per text, depth and sweep: the largest relative change of a carried state in that sweep.

    Args:
        model: in float32 or wider: bf16 states do not settle far enough to see a factor.
        texts: token ids; the first `TOKENS` of each are read, alone.

    Returns:
        Columns `COLUMNS`; text counts from 0, sweeps from 1. A text's rows end where it has settled (the
        residual is below the dtype's tolerance), or after `SWEEPS`.

    Raises:
        SSTError: the states overflow.
    """
    rows, tolerance = [], TOLERANCE[model.backbone.dtype]
    for number, text in enumerate(texts):
        tokens = torch.tensor([list(text)[:TOKENS]], device=model.backbone.device)
        for depth in depths:
            stream = model.new_stream(torch.zeros_like(tokens[:, 0]), tokens.shape[1])
            solved = solve_by_sweeps(model, stream, tokens, iterations=depth, sweeps=SWEEPS, keep=False)
            for sweep, residual in enumerate(solved.certificate.residuals, 1):
                settled = residual < tolerance
                rows.append((number, tokens.shape[1], depth, sweep, residual, settled))
                if settled:
                    break
            if each is not None:
                each()
    return pd.DataFrame(rows, columns=COLUMNS)


def kinds_contraction(
    residuals: Mapping[str, pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0
) -> KindsContraction:
    """Factors from residuals.

    Args:
        residuals: by run, rows as `sweep_residuals` returns them.

    Raises:
        Untestable: there are no residuals.
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
    if not rates:
        raise Untestable("no sweeps were measured")
    return KindsContraction(pd.DataFrame(rates), pd.concat(curves))


def _rate(rows: pd.DataFrame, resamples: int, seed: int) -> dict[str, object]:
    """One run at one depth."""
    last = rows.sort_values("sweep").groupby("text").tail(1)
    settled = last[last["settled"].to_numpy(dtype=bool)]
    slopes = [
        _slope(own["sweep"].to_numpy(dtype=float), np.log(own["residual"].to_numpy()))
        for _, own in rows[rows["residual"] > 0].groupby("text")
        if len(own) > 1
    ]
    sums = np.stack([slopes, np.ones(len(slopes))], axis=1)
    factor = cluster_bootstrap(sums, lambda totals: np.exp(ratio(totals)), resamples, seed=seed)
    return {
        "texts": rows["text"].nunique(),
        **as_columns(factor=factor),
        "sweeps": float(settled["sweep"].median()) if len(settled) else float("nan"),
        "settled": len(settled),
        "at_once": int((settled["sweep"] == 1).sum()),
        "residual": float(last["residual"].median()),
    }


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of y on x."""
    return float(((y - y.mean()) @ np.linalg.pinv((x - x.mean())[:, None]).T)[0])


def _factor(row: Mapping[Any, Any]) -> str:
    """A factor in words."""
    if row["at_once"] == row["texts"]:
        return "no residual after the first"
    factor = Interval(row["factor"], row["factor_low"], row["factor_high"], row["texts"])
    return factor.text() if factor.known else f"{factor.estimate:.3g}"
