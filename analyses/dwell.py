"""Dwell: how long a layer's state stays stable between two shifts, and whether longer than by chance.

If shifts come in bursts, the stable stretches between them are longer than those of a text whose shifts fall
anywhere (`stretches`, which also says how the ends of texts are dealt with). The effect is

    ratio = mean stretch / mean stretch after a shuffle of positions within (question, layer)

1 is chance. The shuffle keeps the rate of every question and layer, and the ends of the text cut shuffled
stretches just as often. It does not keep *where* in the text shifts are frequent: if they are mostly early,
in every question, the ratio is above 1 without any burst. The rates by position say so
(`BasinShifts.by_position`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from dataclasses import replace as replaced

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.basin_shifts import UNKNOWN, BasinShifts
from sst_interp.analyses.figures import shifts as shift_figures
from sst_interp.analyses.parts.question_grid import question_grid
from sst_interp.analyses.parts.stretches import (
    by_chance,
    by_length,
    median_length,
    segments,
    shuffled_lengths,
    stable_stretches,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    percent_text,
    questions_words,
    ratio,
)
from sst_interp.analyses.statistics.permutation import sign_flip


@dataclass(frozen=True, eq=False)
class Dwell(Result):
    """Stable stretches of one comparison and one pair of depths. Lengths are in generated positions."""

    comparison: str
    words: str
    """What was compared, in words."""
    threshold: float
    """Overlap below which a position counts as shifted."""
    n_questions: int
    """Questions with such pairs; each interval says how many it rests on."""
    median: Interval = UNKNOWN
    """Median length of the stretches that begin after a shift; a stretch that the end cuts is censored."""
    median_shuffled: float = math.nan
    """The same if positions are shuffled within (question, layer)."""
    ratio: Interval = UNKNOWN
    """Mean length over that after the shuffle; of (question, layer)s with shifts and stable positions."""
    cut: Interval = UNKNOWN
    """Share of all stable stretches that a beginning or end of text cuts."""
    never: Interval = UNKNOWN
    """Share of (question, layer)s without any shift: one stretch from end to end."""
    lengths: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns length, complete, cut_at_end (both: begin after a shift), and the same two `_shuffled`."""
    by_layer: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns layer, shifted (share of positions), stretches (that begin after a shift), median, ratio, low,
    high, p, p_layers (sign flips of questions: alone, and for all layers at once)."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Stable stretches: {self.words}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer."""
        return self.by_layer

    @property
    def verdict(self) -> str:
        """How long, against the shuffle, with the sample size."""
        if self.not_testable:
            return f"not testable: {self.not_testable}."
        words = f"{self.words}: "
        if math.isfinite(self.median.estimate):
            words += f"between shifts a layer stays stable for {self.median.text()} positions in the median"
        else:
            words += "most stable stretches outlast their text"
        words += (
            f" ({_positions(self.median_shuffled)} if the same shifts fell anywhere); the mean stretch is "
        )
        words += f"{self.ratio.text(digits=4)} times that of chance, {_direction(self.ratio)}. "
        off = int((self.by_layer["p_layers"] < 0.05).sum())
        words += f"{off} of {len(self.by_layer)} layers differ from chance (sign flips, tested together). "
        words += f"{percent_text(self.cut.estimate)} of the stretches are cut by an end of the text; "
        words += f"{percent_text(self.never.estimate)} of (question, layer)s never shift; "
        return words + f"{questions_words(self.n_questions)}."

    def figure(self) -> go.Figure:
        """The distribution of lengths, seen and shuffled."""
        return self.figures()["lengths"]

    def figures(self) -> dict[str, go.Figure]:
        """lengths, ratio_by_layer."""
        return shift_figures.dwell_figures(self)


def _positions(length: float) -> str:
    return f"{length:.3g}" if math.isfinite(length) else "longer than the text"


def _direction(found: Interval) -> str:
    if not found.known:
        return "which is not tested"
    if found.low > 1:
        return "longer than chance: shifts come in bursts"
    return "shorter than chance: shifts keep apart" if found.high < 1 else "not told from chance"


def dwell(pairs: pd.DataFrame, found: BasinShifts, resamples: int = RESAMPLES, seed: int = 0) -> Dwell:
    """Stable stretches for the comparison, pair and threshold of `found`.

    Args:
        pairs: the run's `pairs` table.
        found: from `basin_shifts` on the same table.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        The result; its verdict begins "not testable:" if nothing has both shifts and stable positions.
    """
    if found.not_testable:
        return Dwell(found.comparison, found.words, math.nan, 0, not_testable=found.not_testable)
    grid = question_grid(pairs, found.comparison, found.a, found.b, found.kind)
    n, _, layers = grid.overlap.shape
    span = int(grid.positions[-1] - grid.positions[0]) + 1
    shifted, there = (np.zeros((n, layers, span), dtype=bool) for _ in range(2))
    columns = grid.positions - grid.positions[0]
    shifted[..., columns] = np.moveaxis(grid.shifted(found.threshold), 1, 2)
    there[..., columns] = np.moveaxis(grid.there, 1, 2)
    shifted, there = shifted.reshape(-1, span), there.reshape(-1, span)
    pieces, runs = segments(shifted, there), stable_stretches(shifted, there)
    result = Dwell(found.comparison, found.words, found.threshold, 0)
    if not pieces.mixed.any():
        which = "no pair shifted" if not pieces.k.any() else "no text has both shifts and stable positions"
        reason = f"{which} below {found.threshold:.4g}, so no stretch lies between shifts"
        return replaced(result, not_testable=reason)

    of_question, of_layer = (
        by_length(runs, group, size, span)
        for group, size in ((runs.row // layers, n), (runs.row % layers, layers))
    )
    used = of_question.sum(axis=(1, 2)) > 0
    complete, cut = shuffled_lengths(pieces, span)
    both = of_question.sum(axis=0)
    lengths = {"length": np.arange(1, span + 1), "complete": both[0], "cut_at_end": both[1]}
    lengths |= {"complete_shuffled": complete, "cut_at_end_shuffled": cut}
    chance = by_chance(pieces, runs, n, layers)
    varied = chance[..., 1].sum(axis=1) > 0
    stretches = np.bincount(runs.row // layers, minlength=n)
    uncut = of_question[:, 0].sum(axis=1)
    calm = (there.any(axis=1) & ~shifted.any(axis=1)).reshape(n, layers).sum(axis=1)
    rows = there.any(axis=1).reshape(n, layers).sum(axis=1)

    def share(top: np.ndarray, bottom: np.ndarray) -> Interval:
        return cluster_bootstrap(np.stack([top, bottom], -1)[bottom > 0], resamples=resamples, seed=seed)

    return replaced(
        result,
        n_questions=n,
        median=_median(of_question[used], span, resamples, seed),
        median_shuffled=_within(float(median_length(complete, cut)), span),
        ratio=cluster_bootstrap(chance.sum(axis=1)[varied], ratio, resamples, seed=seed),
        cut=share(stretches - uncut, stretches),
        never=share(calm, rows),
        lengths=pd.DataFrame(lengths).iloc[: _last(lengths)],
        by_layer=_by_layer(grid.layers, shifted, there, of_layer, chance, resamples, seed),
    )


def _median(counts: np.ndarray, span: int, resamples: int, seed: int) -> Interval:
    """Censored median of per-question counts [question, 2, length]."""
    found = cluster_bootstrap(counts, lambda t: median_length(t[:, 0], t[:, 1]), resamples, seed=seed)
    if found.estimate > span:
        reason = "more than half of the stretches outlast their text"
        return Interval(math.nan, math.nan, math.nan, found.n_questions, reason=reason)
    if found.high > span:
        return replaced(found, high=math.nan, reason=f"from {found.low:.3g} to beyond the longest text")
    return found


def _within(length: float, span: int) -> float:
    return length if length <= span else math.nan


def _last(lengths: dict[str, np.ndarray]) -> int:
    """Rows up to the longest stretch seen, or expected at all often."""
    any_there = sum(np.where(part >= 0.5, 1, 0) for name, part in lengths.items() if name != "length")
    return int(np.flatnonzero(any_there).max(initial=0)) + 1


def _by_layer(
    layers: np.ndarray,
    shifted: np.ndarray,
    there: np.ndarray,
    counts: np.ndarray,
    chance: np.ndarray,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """A row per layer.

    `shifted` and `there` are [row, position], `counts` [layer, 2, length], `chance` [question, layer, 2].
    """
    k = len(layers)
    estimate, low, high = bootstrap_ends(chance, ratio, resamples, seed=seed)
    # Fewer stretches than expected are longer ones: the sign says which.
    test = sign_flip(np.where(chance[..., 1] > 0, chance[..., 0] - chance[..., 1], np.nan), resamples, seed)
    positions, shifts = (part.reshape(-1, k, part.shape[1]).sum(axis=(0, 2)) for part in (there, shifted))
    median = median_length(counts[:, 0], counts[:, 1])
    return pd.DataFrame(
        {
            "layer": layers,
            "shifted": shifts / np.maximum(positions, 1),
            "stretches": counts.sum(axis=(1, 2)),
            "median": np.where(median <= counts.shape[-1], median, np.nan),
            "ratio": estimate,
            "low": low,
            "high": high,
            "p": test.p_value,
            "p_layers": test.p_family,
        }
    )
