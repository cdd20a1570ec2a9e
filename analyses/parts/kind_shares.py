"""The shares of one run of a comparison of kinds, and their difference from the first run's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD
from sst_interp.analyses.overlap import OverlapDistribution, overlap_of, select
from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    histogram_quantile,
    percent_text,
    ratio,
    share,
)
from sst_interp.analyses.statistics.modes import to_overlap


class Compared(NamedTuple):
    """One run that is compared."""

    name: str
    kind: str
    """In words: `State Stream Transformer`."""
    pairs: pd.DataFrame
    """Its `pairs` table."""
    no_stream: bool = False
    """Every depth computes the same: what differs is the noise floor."""


class Shares(NamedTuple):
    """One run in one comparison, (1, deepest)."""

    run: str
    kind: str
    comparison: str
    a: int
    b: int
    pairs: int
    shifted: Interval
    """Share of pairs with an overlap below 0.99; the others are stable."""
    modes: str
    antimode: float
    """Of the run's own overlaps; NaN with one mode."""
    shifted_at_antimode: Interval | None
    """Share below the antimode, if there is one."""
    median: Interval
    """Median overlap over pairs."""
    identical: float
    """Share of pairs that are bit-identical."""
    difference: Interval | None
    """`shifted` minus the first run's, over the questions that both have; None for the first run."""


def shares_of(
    run: Compared,
    comparison: str,
    overlap: str,
    found: OverlapDistribution,
    difference: Interval | None,
    resamples: int,
    seed: int,
) -> Shares:
    """The row of one run in one comparison; arguments as `kinds`.

    Args:
        found: the run's overlaps of the comparison, (1, deepest).
        difference: from the first run, if this is another.
    """
    pairs, a, b = select(run.pairs, comparison)
    pairs = pairs.sort_values("question", kind="stable")  # the resamples do not depend on the order of rows
    values, question = overlap_of(pairs, overlap), pairs["question"].to_numpy()
    there = np.isfinite(values)
    values, question = values[there], question[there]
    antimode = found.modes.antimode
    at_own = None if antimode is None else share(question, values < antimode.estimate, resamples, seed)
    return Shares(
        run=run.name,
        kind=run.kind,
        comparison=comparison,
        a=a,
        b=b,
        pairs=found.n_pairs,
        shifted=share(question, values < PAPER_THRESHOLD, resamples, seed),
        modes=str(found.modes.count),
        antimode=float("nan") if antimode is None else antimode.estimate,
        shifted_at_antimode=at_own,
        median=median_overlap(found, float(np.median(values)), resamples, seed),
        identical=found.identical,
        difference=difference,
    )


def median_overlap(
    found: OverlapDistribution, exact: float, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The median over pairs; the interval's ends are read off histograms that resolve both ends."""

    def median(totals: np.ndarray) -> np.ndarray:
        return to_overlap(histogram_quantile(totals, found.edges, 0.5), found.resolution)

    read = cluster_bootstrap(found.histograms, median, resamples, seed=seed)
    low, high = min(read.low, exact), max(read.high, exact)  # NaN ends stay NaN
    return Interval(exact, low, high, read.n_questions, read.level, read.reason)


def below(pairs: pd.DataFrame, comparison: str, overlap: str) -> pd.DataFrame:
    """By question: pairs below 0.99, and pairs, of (1, deepest)."""
    rows, _, _ = select(pairs, comparison)
    values = overlap_of(rows, overlap)
    there = np.isfinite(values)
    counted = pd.DataFrame({"below": values[there] < PAPER_THRESHOLD, "pairs": 1.0})
    return counted.groupby(rows["question"].to_numpy()[there]).sum().astype(float)


def difference_of(own: pd.DataFrame, first: pd.DataFrame, resamples: int, seed: int) -> Interval:
    """Share of `own` minus share of `first`, both from the same resamples of their common questions."""
    common = own.index.intersection(first.index)
    sums = np.stack([own.loc[common].to_numpy(), first.loc[common].to_numpy()], axis=1)
    if not len(sums):
        return Interval(np.nan, np.nan, np.nan, 0, LEVEL, "no common questions")

    def between(totals: np.ndarray) -> np.ndarray:
        shares = ratio(totals)
        return shares[..., 0] - shares[..., 1]

    estimate, low, high = (float(v) for v in bootstrap_ends(sums, between, resamples, seed=seed))
    reason = "one question: no spread between questions to measure" if len(sums) == 1 else None
    return Interval(estimate, low, high, len(sums), LEVEL, reason)


def record(row: Shares) -> dict[str, object]:
    """A row of the table."""
    nothing = Interval(np.nan, np.nan, np.nan, 0)
    own, apart = row.shifted_at_antimode or nothing, row.difference or nothing
    return {
        **{"comparison": row.comparison, "run": row.run, "kind": row.kind, "a": row.a, "b": row.b},
        **{"questions": row.shifted.n_questions, "pairs": row.pairs, "stable": 1 - row.shifted.estimate},
        **{"shifted": row.shifted.estimate, "low": row.shifted.low, "high": row.shifted.high},
        **{"median overlap": row.median.estimate, "median low": row.median.low},
        **{"median high": row.median.high, "modes": row.modes, "antimode": row.antimode},
        **{"shifted at antimode": own.estimate, "antimode low": own.low, "antimode high": own.high},
        **{"identical": row.identical, "difference": apart.estimate},
        **{"difference low": apart.low, "difference high": apart.high},
    }


_UNKNOWN = Interval(float("nan"), float("nan"), float("nan"), 0)
BLANK = Shares("", "", "", 1, 1, 0, _UNKNOWN, "", float("nan"), None, _UNKNOWN, float("nan"), None)


def printed(row: Shares) -> dict[str, str]:
    """A row as commands and documents show it: shares in percent with their intervals."""
    apart = "" if row.difference is None else row.difference.text(percent=True)
    return {
        "comparison": row.comparison,
        "run": row.run,
        "kind": row.kind,
        "questions": str(row.shifted.n_questions),
        "stable": percent_text(1 - row.shifted.estimate),
        "shifted (below 0.99)": row.shifted.text(percent=True),
        "modes": row.modes,
        "shifted (below the antimode)": _at_own(row),
        "median overlap": row.median.text(digits=4),
        "minus the first": apart,
    }


def _at_own(row: Shares) -> str:
    if row.shifted_at_antimode is None:
        return "no antimode"
    return f"{row.shifted_at_antimode.text(percent=True)} at {row.antimode:.4g}"
