"""Kinds of models beside one another: on the same questions, how much does depth change the state of each?

A backbone without a stream computes the same at every depth, so its shares are the noise floor of the
arithmetic. Shares are of (position, layer) pairs between depth (or iteration) 1 and the deepest. The three
comparisons are never pooled, and every interval resamples questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import plots as intervals
from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD
from sst_interp.analyses.overlap import overlap_distribution
from sst_interp.analyses.parts.kind_shares import (
    BLANK,
    Compared,
    Shares,
    below,
    difference_of,
    printed,
    record,
    shares_of,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, questions_words
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError


@dataclass(frozen=True, eq=False)
class Kinds(Result):
    """Stable and shifted shares of several runs on the same questions."""

    overlap: str
    """Which overlap."""
    rows: tuple[Shares, ...]
    floor: str | None
    """The run without a stream, if there is one."""
    missing: dict[str, str]
    """`comparison, run` that cannot be tested, and why."""

    @property
    def title(self) -> str:
        """What it is."""
        return "Kinds of models on the same questions"

    @property
    def table(self) -> pd.DataFrame:
        """A row per comparison and run; shares and their interval ends are fractions."""
        return pd.DataFrame([record(row) for row in self.rows], columns=list(record(BLANK)))

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it: shares in percent with their intervals."""
        return [printed(row) for row in self.rows]

    @property
    def verdict(self) -> str:
        """Shares at 0.99 in each comparison, and which differ from the first run's."""
        if not self.rows:
            return "not testable: " + "; ".join(self.missing.values() or ["no runs were given"]) + "."
        found = [_sentence([row for row in self.rows if row.comparison == c]) for c in COMPARISONS]
        words = " ".join(sentence for sentence in found if sentence)
        if self.floor is not None:
            words += f" {self.floor} has no stream and computes the same at every depth: its shares are the "
            words += "noise floor."
        if self.missing:
            words += " Not testable: " + "; ".join(f"{k} ({why})" for k, why in self.missing.items()) + "."
        return words

    def figure(self) -> go.Figure:
        """Shifted share by comparison and run, with intervals."""
        dots = [
            intervals.Dot(
                f"{row.comparison}: {row.kind} ({row.run})",
                row.comparison,
                row.shifted.estimate,
                row.shifted.low,
                row.shifted.high,
            )
            for row in self.rows
        ]
        n = max((row.shifted.n_questions for row in self.rows), default=0)
        deepest = max((row.b for row in self.rows), default=1)
        figure = intervals.dots(
            "How much depth changes the state, by kind of model",
            f"depth (or iteration) 1 against {deepest}; {questions_words(n)}; bars: 95%, questions resampled",
            f"share of (position, layer) pairs with {self.overlap} overlap below {PAPER_THRESHOLD}",
            dots,
        )
        figure.update_xaxes(tickformat=".0%", rangemode="tozero")
        return figure


def kinds(
    runs: Sequence[Compared], overlap: str = "cosine", resamples: int = RESAMPLES, seed: int = 0
) -> Kinds:
    """Compare runs on the same questions. The first is the one that the others are compared with.

    Args:
        runs: whoever asks sees to it that questions, depths and budgets agree (`sst_interp.comparing`).
        overlap: which overlap (`overlap_of`).
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; a run without pairs of a comparison is in `missing`.
    """
    rows, missing = [], {}
    for comparison in COMPARISONS:
        first: pd.DataFrame | None = None
        for k, run in enumerate(runs):
            try:
                found = overlap_distribution(run.pairs, comparison, overlap, None, None, resamples, seed)
            except SSTError as error:
                missing[f"{comparison}, {run.name}"] = error.message
                continue
            counts = below(run.pairs, comparison, overlap)
            first = counts if k == 0 else first
            between = None if k == 0 or first is None else difference_of(counts, first, resamples, seed)
            rows.append(shares_of(run, comparison, overlap, found, between, resamples, seed))
    floor = next((run.name for run in runs if run.no_stream), None)
    return Kinds(overlap.replace("_", " "), tuple(rows), floor, missing)


def _sentence(rows: Sequence[Shares]) -> str:
    """One comparison in words."""
    if not rows:
        return ""
    said = []
    for row in rows:
        words = f"{row.run} ({row.kind}) {row.shifted.text(percent=True)}"
        if row.difference is not None:
            apart = row.difference.low > 0 or row.difference.high < 0
            words += "" if apart else ", not told apart from the first"
        said.append(words)
    n = questions_words(max(row.shifted.n_questions for row in rows))
    return f"{rows[0].comparison}, 1 against {rows[0].b}, {n}: below 0.99 are " + "; ".join(said) + "."
