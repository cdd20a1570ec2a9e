"""Basin shifts (claims C1, C3): where does extra iteration change the model's state, and how often?

A (position, layer) pair has *shifted* if its overlap between two depths is below a threshold. Each comparison
has its own threshold; the headline is one pair of depths, (1, deepest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.contrast import PAPER_THRESHOLD, Contrast
from sst_interp.analyses.modes import OverlapDistribution, overlap_distribution
from sst_interp.analyses.plots import Dot, Line, dots, lines, matrix
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    by,
    cluster_bootstrap,
    histogram_quantile,
    none_seen_bound,
    percent_text,
    questions_words,
    ratio,
    share,
)
from sst_interp.errors import Untestable
from sst_interp.models.choices import COMPARISONS, Comparison


@dataclass(frozen=True, eq=False)
class BasinShifts(Shifts):
    """How many pairs shifted in one comparison, where, and by how much. All intervals resample questions."""

    named = "Basin shifts"
    shown = "per_pair"
    provenance: str
    """Where the threshold comes from."""
    share: Interval
    """Shifted share of the (position, layer) pairs."""
    share_at_paper: Interval
    """The same at the paper's 0.99, whatever the threshold."""
    per_pair: pd.DataFrame
    """A row per (a, b): pairs, questions, shifted shares at both thresholds, median and lowest overlap, and
    the share of pairs that are bit-identical."""
    distribution: OverlapDistribution
    """Overlaps of the headline pair, with their modes."""
    by_position: pd.DataFrame
    """Columns position, share, low, high, pairs, questions, questions_shifted (share of questions with a
    shift in any layer at this position: claim C8), band_low, band_high (for all positions at once)."""
    by_layer: pd.DataFrame
    """Columns layer, share, low, high, pairs, questions, questions_shifted, band_low, band_high."""
    rates: pd.DataFrame
    """Shift rate, positions down, layers across; NaN where there is no pair."""
    norm_ratio_shifted: Interval
    """Median of norm_b / norm_a over shifted pairs: a direction can turn without the size changing."""
    norm_ratio_stable: Interval
    of_layer: float
    """Share of the variance of "shifted" that the layer alone accounts for (eta squared)."""
    of_position: float
    """The same for the position alone."""
    same_prefix: Interval | None = None
    """free-running only: shifted share while both depths have read the same tokens ..."""
    other_prefix: Interval | None = None
    """... and from the first differing token on."""
    same_prefix_of_pairs: float = math.nan
    """free-running only: share of the pairs before the first differing token."""

    @property
    def n_pairs(self) -> int:
        """(question, position, layer) pairs of the headline."""
        return self.distribution.n_pairs

    @property
    def verdict(self) -> str:
        """Whether shifts are a second basin, how many there are, and what else accounts for them."""
        modes, words = self.distribution.modes, self.words.capitalize()
        n = f"{self.n_pairs:,} pairs from {questions_words(self.n_questions)}"
        below = f"below {self.threshold:.4g} ({self.provenance})"
        if self.share.estimate == 0:
            bound = percent_text(none_seen_bound(self.n_questions))
            said = f"No basin shift. {words}: no pair of {n} fell {below}; at most {bound} of such "
            return said + f"questions have one (95%).{self.distribution.left_out}"
        if modes.two:
            said = "Shifted pairs are a second mode. "
        elif math.isnan(modes.p_value):
            said = f"Pairs shift; whether as a second mode was not tested: {modes.reason}. "
        else:
            said = "Shifts are a cut through one spread, not a second basin. "
        said += f"{words}: {self.share.text(percent=True)} of {n} fell {below}."
        if self.same_prefix is not None and self.other_prefix is not None:
            said += f" Before the two texts first differ {self.same_prefix.text(percent=True)} shift, "
            said += f"afterwards {self.other_prefix.text(percent=True)}"
            mostly = self.other_prefix.estimate > 2 * self.same_prefix.estimate
            said += ": most of it says only that the texts diverged." if mostly else "."
        which, part = max(("layer", self.of_layer), ("position", self.of_position), key=lambda x: x[1])
        if part > 0.5:
            said += f" The {which} alone accounts for {part:.0%} of the variance of which pairs shift."
        return said + self.distribution.left_out

    def figure(self) -> go.Figure:
        """The distribution of overlaps with the threshold."""
        return self.distribution.figure(self.threshold)

    def figures(self) -> dict[str, go.Figure]:
        """Overlap, by_position, by_layer, rates, norm_ratio."""
        words = self.subtitle
        rates = matrix(
            self.rates, "Shift rate by position and layer", words, "share of questions",
            zmin=0, zmax=max(0.05, float(np.nanmax(self.rates.to_numpy()))),
        )  # fmt: skip
        return {
            "overlap": self.figure(),
            "by_position": _rates(self.by_position, "generated position (0 emits the first token)", words),
            "by_layer": _rates(self.by_layer, "layer (0-based)", words),
            "rates": rates,
            "norm_ratio": self._norms(words),
        }

    def _norms(self, words: str) -> go.Figure:
        """Median norm ratio at stable and at shifted pairs."""
        both = {"stable": self.norm_ratio_stable, "shifted": self.norm_ratio_shifted}
        rows = [Dot(name, name, i.estimate, i.low, i.high) for name, i in both.items()]
        figure = dots("Size of the state", words, "median of norm b / norm a (log scale)", rows, reference=1)
        figure.update_xaxes(type="log")
        return figure


def _rates(table: pd.DataFrame, axis: str, words: str) -> go.Figure:
    """Shift rate by the first column of a table, with its interval as a band."""
    by = str(table.columns[0])
    line = Line("shift rate", table[by], table["share"], table["low"], table["high"])
    return lines(f"Shift rate by {by}", words, axis, "shifted share of pairs", [line], percent=True)


def question_figure(overlap: pd.DataFrame, subtitle: str) -> go.Figure:
    """One question's overlap by position and layer (from `Contrast.question_map`)."""
    return matrix(overlap, "Overlap of one question", subtitle, "overlap", zmax=1)


@analysis(
    "Basin shifts",
    "How much of the state is reorganised, and where?",
    claims=("C1", "C3"),
    order=10,
    captions={
        "overlap": "Two separate humps would be two basins; one hump with a tail is one spread that a "
        "threshold cuts through.",
        "by_position": "A high rate at position 0 alone is also what a start-up transient looks like.",
        "rates": "Late positions rest on fewer questions, because short answers have ended.",
        "norm_ratio": "Whether a shifted state also changes its size: an overlap sees directions only.",
    },
)
def basin_shifts(c: Contrast) -> BasinShifts:
    """Basin shifts of one comparison.

    Raises:
        Untestable: if no pair has an overlap.
        SSTError: if the chosen overlap was not captured.
    """
    rows, overlap = c.rows[c.there], c.overlap[c.there]
    shifted = overlap < c.threshold
    question, layer, position = (rows[name].to_numpy() for name in ("question", "layer", "position"))
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = rows["norm_b"].to_numpy(dtype=float) / rows["norm_a"].to_numpy(dtype=float)
    distribution = overlap_distribution(c)
    shifts = BasinShifts(
        **c.judged,
        n_questions=len(distribution.histograms),
        provenance=c.division.provenance,
        share=share(question, shifted, *c.resampling),
        share_at_paper=share(question, overlap < PAPER_THRESHOLD, *c.resampling),
        per_pair=_per_pair(c),
        distribution=distribution,
        by_position=by("position", position, question, shifted, *c.resampling),
        by_layer=by("layer", layer, question, shifted, *c.resampling),
        rates=_rate_matrix(c),
        norm_ratio_shifted=_median_ratio(question[shifted], norms[shifted], *c.resampling),
        norm_ratio_stable=_median_ratio(question[~shifted], norms[~shifted], *c.resampling),
        of_layer=_eta_squared(layer, shifted),
        of_position=_eta_squared(position, shifted),
    )
    if c.comparison != "free_running":
        return shifts
    same = rows["same_prefix"].to_numpy(dtype=bool)
    return replace(
        shifts,
        same_prefix=share(question[same], shifted[same], *c.resampling),
        other_prefix=share(question[~same], shifted[~same], *c.resampling),
        same_prefix_of_pairs=float(same.mean()),
    )


def all_comparisons(
    c: Contrast, each: Callable[[Iterable[Comparison]], Iterable[Comparison]] = iter
) -> dict[str, BasinShifts]:
    """Basin shifts of every comparison that the run has, the one the choices lead with first.

    `each` wraps the loop over comparisons (a progress bar).
    """
    results = {}
    for comparison in each(sorted(COMPARISONS, key=lambda name: name != c.choices.comparison)):
        try:
            results[comparison] = basin_shifts(c.to(comparison))
        except Untestable:
            continue
    return results


def _per_pair(c: Contrast) -> pd.DataFrame:
    """A row per (a, b) that has an overlap."""
    ends = ("shifted", "low", "high")
    columns = ["a", "b", "questions", "pairs", *ends, *(f"{end} at {PAPER_THRESHOLD}" for end in ends)]
    columns += ["median overlap", "lowest overlap", "identical"]
    records = []
    for a, b in c.pairs_there:
        other = c.at(a, b)
        there = np.isfinite(other.overlap)
        if not there.any():
            continue
        values, question = other.overlap[there], other.rows["question"].to_numpy()[there]
        own, theirs = (share(question, values < at, *c.resampling) for at in (c.threshold, PAPER_THRESHOLD))
        numbers = [v for i in (own, theirs) for v in (i.estimate, i.low, i.high)]
        identical = (other.rows["relative_l2"].to_numpy()[there] == 0).mean()
        counts = (a, b, own.n_questions, len(values))
        records.append((*counts, *numbers, np.median(values), values.min(), identical))
    return pd.DataFrame(records, columns=columns)


def _rate_matrix(c: Contrast) -> pd.DataFrame:
    """Shift rate over questions, positions down, layers across; NaN where there is no pair."""
    counts = [part.sum(axis=0).astype(float) for part in (c.grid.shifted(c.threshold), c.grid.there)]
    return pd.DataFrame(
        ratio(np.stack(counts, axis=-1)),
        index=pd.Index(c.grid.positions, name="position"),
        columns=pd.Index(c.grid.layers, name="layer"),
    )


LOG_RATIO_EDGES = np.linspace(-np.log(64), np.log(64), 2001)
"""Bins for medians of norm ratios: 0.4% wide, from 1/64 to 64."""


def _median_ratio(
    question: np.ndarray, ratios: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Median of positive ratios over pairs; the interval's ends are read off histograms 0.4% wide."""
    usable = np.isfinite(ratios) & (ratios > 0)
    codes, names = pd.factorize(question[usable], sort=True)
    logs = np.log(ratios[usable])
    bins = len(LOG_RATIO_EDGES) - 1
    index = np.clip(np.searchsorted(LOG_RATIO_EDGES, logs, side="right") - 1, 0, bins - 1)
    counts = np.bincount(codes * bins + index, minlength=len(names) * bins).reshape(len(names), bins)

    def median(totals: np.ndarray) -> np.ndarray:
        return np.exp(histogram_quantile(totals, LOG_RATIO_EDGES, 0.5))

    interval = cluster_bootstrap(counts, median, resamples, seed=seed)
    if not len(logs):
        return interval
    exact = float(np.exp(np.median(logs)))
    low, high = min(interval.low, exact), max(interval.high, exact)  # NaN ends stay NaN
    return replace(interval, estimate=exact, low=low, high=high)


def _eta_squared(group: np.ndarray, shifted: np.ndarray) -> float:
    """Share of the variance of `shifted` that lies between the groups; NaN if nothing varies."""
    codes, names = pd.factorize(group)
    total = np.var(shifted)
    if not total:
        return math.nan
    counts = np.bincount(codes, minlength=len(names))
    rates = np.bincount(codes, shifted, len(names)) / counts
    return float(np.average((rates - shifted.mean()) ** 2, weights=counts) / total)
