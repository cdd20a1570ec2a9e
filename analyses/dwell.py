"""Dwell: how long does a layer's state stay stable between two shifts, and is that longer than by chance?

A row is one question and one layer. A *stretch* is a longest sequence of neighbouring stable positions,
*complete* if a shift stands on both sides. A text's beginning and end, and a position without an overlap, cut
it short (censoring).

**The effect.** ratio = mean stretch / mean stretch after a shuffle of positions within (question, layer). 1
is chance; bursts of shifts make it larger, and so do shifts that are mostly early in every text
(`BasinShifts.by_position`).

**The shuffle.** Of n positions with k shifts all arrangements are as likely, so nothing has to be drawn:

    P(a gap holds L positions) = C(n - L - 1, k - 1) / C(n, k)        expected stretches = (n - k) (k + 1) / n

**Censoring.** Long stretches are cut more often. `median_length` is Kaplan and Meier's, over the stretches
that begin after a shift: one that the end of the text cuts counts as "at least this long".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy.special import gammaln

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.plots import BLUE, GREY, ORANGE, Line, canvas, lines
from sst_interp.analyses.result import Shifts, analysis
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    Resampling,
    bootstrap_ends,
    cluster_bootstrap,
    nothing,
    percent_text,
    questions_words,
    ratio,
)
from sst_interp.analyses.statistics.permutation import sign_flip
from sst_interp.errors import Untestable


@dataclass(frozen=True, eq=False)
class Dwell(Shifts):
    """Stable stretches of one comparison and one pair of depths. Lengths are in generated positions."""

    named = "Stable stretches"
    shown = "by_layer"
    median: Interval
    """Median length of the stretches that begin after a shift; a stretch that the end cuts is censored."""
    median_shuffled: float
    """The same if positions are shuffled within (question, layer)."""
    ratio: Interval
    """Mean length over that after the shuffle; of (question, layer)s with shifts and stable positions."""
    cut: Interval
    """Share of all stable stretches that a beginning or end of text cuts."""
    never: Interval
    """Share of (question, layer)s without any shift: one stretch from end to end."""
    lengths: pd.DataFrame
    """Columns length, complete, cut_at_end (both: begin after a shift), and the same two `_shuffled`."""
    by_layer: pd.DataFrame
    """Columns layer, shifted (share of positions), stretches (that begin after a shift), median, ratio, low,
    high, p, p_layers (sign flips of questions: alone, and for all layers at once)."""

    @property
    def verdict(self) -> str:
        """Whether shifts come in bursts, and how long the stretches are, with the sample size."""
        words = f"{_answer(self.ratio)}. {self.words.capitalize()}: the mean stable stretch is "
        words += f"{self.ratio.text(digits=4)} times that of the same shifts shuffled over positions, the "
        words += f"median {self.median.text()} positions (shuffled: {_positions(self.median_shuffled)}). "
        off = int((self.by_layer["p_layers"] < 0.05).sum())
        words += f"{off} of {len(self.by_layer)} layers differ from chance (sign flips, tested together). "
        words += f"{percent_text(self.cut.estimate)} of the stretches are cut by an end of the text; "
        return words + f"{questions_words(self.n_questions)}."

    def figure(self) -> go.Figure:
        """Stretches of each length, seen and shuffled."""
        figure = canvas(
            "Stable stretches between two shifts",
            self.subtitle,
            "length (generated positions)",
            "complete stretches (log scale)",
        )
        for name, column, colour in (
            ("seen", "complete", BLUE),
            ("positions shuffled", "complete_shuffled", ORANGE),
        ):
            count = self.lengths[column].to_numpy(dtype=float)
            figure.add_scatter(
                x=self.lengths["length"], y=np.where(count >= 0.5, count, np.nan), mode="lines+markers",
                name=name, line={"color": colour, "width": 2}, marker={"size": 5},
                hovertemplate=f"{name}: %{{y:,.0f}} of %{{x}} positions<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
        return figure

    def figures(self) -> dict[str, go.Figure]:
        """lengths, and ratio_by_layer: mean length over chance."""
        layers = self.by_layer
        by_layer = lines(
            "Mean stable stretch over that of a shuffle, by layer",
            f"{self.subtitle}; 95% interval of each layer",
            "layer (0-based)",
            "ratio (1: chance)",
            [Line("ratio", layers["layer"], layers["ratio"], layers["low"], layers["high"])],
        )
        by_layer.add_hline(y=1, line={"color": GREY, "dash": "dot"})
        return {"lengths": self.figure(), "ratio_by_layer": by_layer}


def _positions(length: float) -> str:
    return f"{length:.3g}" if math.isfinite(length) else "longer than the text"


def _answer(ratio: Interval) -> str:
    if not ratio.known:
        return "Whether shifts come in bursts is not tested"
    if ratio.low > 1:
        return "Shifts come in bursts, with long stable stretches between"
    return "Shifts keep apart" if ratio.high < 1 else "Shifts fall as they would by chance"


@analysis("Stable stretches", "How long does a layer stay stable between shifts?", order=60)
def dwell(c: Contrast) -> Dwell:
    """Stable stretches between shifts.

    Raises:
        Untestable: if no text has both shifts and stable positions.
    """
    grid = c.grid
    n, _, layers = grid.overlap.shape
    span = int(grid.positions[-1] - grid.positions[0]) + 1
    shifted, there = (np.zeros((n, layers, span), dtype=bool) for _ in range(2))
    columns = grid.positions - grid.positions[0]
    shifted[..., columns] = np.moveaxis(grid.shifted(c.threshold), 1, 2)
    there[..., columns] = np.moveaxis(grid.there, 1, 2)
    shifted, there = shifted.reshape(-1, span), there.reshape(-1, span)
    pieces, runs = segments(shifted, there), stable_stretches(shifted, there)
    if not pieces.mixed.any():
        which = "no pair shifted" if not pieces.k.any() else "no text has both shifts and stable positions"
        raise Untestable(f"{which} below {c.threshold:.4g}, so no stretch lies between shifts")

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
    how = c.resampling._asdict()

    def share(top: np.ndarray, bottom: np.ndarray) -> Interval:
        return cluster_bootstrap(np.stack([top, bottom], -1)[bottom > 0], **how)

    shuffled = float(median_length(complete, cut))
    return Dwell(
        **c.judged,
        n_questions=n,
        median=_median(of_question[used], span, c.resampling),
        median_shuffled=shuffled if shuffled <= span else math.nan,
        ratio=cluster_bootstrap(chance.sum(axis=1)[varied], ratio, **how),
        cut=share(stretches - uncut, stretches),
        never=share(calm, rows),
        lengths=pd.DataFrame(lengths).iloc[: _last(lengths)],
        by_layer=_by_layer(grid.layers, shifted, there, of_layer, chance, c.resampling),
    )


def _median(counts: np.ndarray, span: int, resampling: Resampling) -> Interval:
    """Censored median of per-question counts [question, 2, length]."""
    median = cluster_bootstrap(counts, lambda t: median_length(t[:, 0], t[:, 1]), **resampling._asdict())
    if median.estimate > span:
        return nothing("more than half of the stretches outlast their text", median.n_questions)
    if median.high > span:
        return replace(median, high=math.nan, reason=f"from {median.low:.3g} to beyond the longest text")
    return median


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
    resampling: Resampling,
) -> pd.DataFrame:
    """A row per layer.

    `shifted` and `there` are [row, position], `counts` [layer, 2, length], `chance` [question, layer, 2].
    """
    k = len(layers)
    estimate, low, high = bootstrap_ends(chance, ratio, **resampling._asdict())
    # Fewer stretches than expected are longer ones: the sign says which.
    fewer = np.where(chance[..., 1] > 0, chance[..., 0] - chance[..., 1], np.nan)
    test = sign_flip(fewer, *resampling)
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


CHUNK = 1024


class Stretches(NamedTuple):
    """Stable stretches, one entry each."""

    row: np.ndarray
    """Which row it is in."""
    length: np.ndarray
    """Positions."""
    opened: np.ndarray
    """Whether a shift stands before it; if not, its beginning is not seen."""
    closed: np.ndarray
    """Whether a shift stands after it; if not, the text (or what was measured of it) ends first."""


class Segments(NamedTuple):
    """Unbroken pieces of the rows, one entry each; usually a row is one."""

    row: np.ndarray
    n: np.ndarray
    """Positions."""
    k: np.ndarray
    """Shifts."""

    @property
    def mixed(self) -> np.ndarray:
        """Whether there are shifts and stable positions: nothing else can be shuffled."""
        return (self.k > 0) & (self.k < self.n)

    @property
    def expected(self) -> np.ndarray:
        """Expected number of stable stretches if positions are shuffled."""
        return (self.n - self.k) * (self.k + 1) / self.n


def stable_stretches(shifted: np.ndarray, there: np.ndarray) -> Stretches:
    """Every stable stretch of rows: shifted, there bool [row, position]."""
    kind = _bordered(np.where(there, shifted, 2).astype(np.int8), 2)
    starts = np.flatnonzero(np.diff(kind)) + 1
    ends = np.append(starts[1:], len(kind))
    stable = (kind[starts] == 0) & (ends < len(kind))
    starts, ends = starts[stable], ends[stable]
    row = (starts - 1) // (shifted.shape[1] + 1)
    return Stretches(row, ends - starts, kind[starts - 1] == 1, kind[ends] == 1)


def segments(shifted: np.ndarray, there: np.ndarray) -> Segments:
    """The unbroken pieces of rows: shifted, there bool [row, position]."""
    present = _bordered(there.astype(np.int8), 0)
    edges = np.flatnonzero(np.diff(present)) + 1
    starts, ends = edges[::2], edges[1::2]
    before = np.append(0, np.cumsum(_bordered((shifted & there).astype(np.int64), 0)))
    return Segments((starts - 1) // (shifted.shape[1] + 1), ends - starts, before[ends] - before[starts])


def _bordered(values: np.ndarray, border: int) -> np.ndarray:
    """Rows end to end, with a border before the first and after each."""
    padded = np.pad(values, ((0, 0), (0, 1)), constant_values=border)
    return np.append(np.array([border], dtype=values.dtype), padded.ravel())


def shuffled_lengths(pieces: Segments, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Expected stretches of each length 1..longest after a shuffle: complete, and opened but not closed."""
    complete, cut = np.zeros(longest), np.zeros(longest)
    mixed = pieces.mixed
    codes, counts = np.unique(pieces.n[mixed] * (longest + 2) + pieces.k[mixed], return_counts=True)
    length = np.arange(1, longest + 1)
    for start in range(0, len(codes), CHUNK):
        chunk, count = codes[start : start + CHUNK], counts[start : start + CHUNK]
        n, k = (part[:, None].astype(float) for part in divmod(chunk, longest + 2))
        possible = length <= n - k
        left = np.where(possible, n - length, k)  # positions outside the gap, one of them its border
        log = _log_choose(left - 1, k - 1) - _log_choose(n, k)
        gap = np.where(possible, np.exp(log), 0) * count[:, None]
        complete += ((k - 1) * gap).sum(axis=0)
        cut += gap.sum(axis=0)
    return complete, cut


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def median_length(complete: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Kaplan and Meier's median of lengths 1..L: counts [..., L] of both kinds -> [...].

    The first length that at most half of the stretches outlast; L + 1 if more than half outlast them all, NaN
    without stretches.
    """
    both = complete + cut
    at_risk = np.cumsum(both[..., ::-1], axis=-1)[..., ::-1]
    ending = np.divide(complete, at_risk, out=np.zeros(np.shape(both)), where=at_risk > 1e-12)
    outlasting = np.cumprod(1 - ending, axis=-1)
    median = 1.0 + (outlasting > 0.5 + 1e-12).sum(axis=-1)
    return np.where(at_risk[..., 0] > 1e-12, median, np.nan)


def by_length(runs: Stretches, group: np.ndarray, size: int, span: int) -> np.ndarray:
    """Stretches that begin after a shift, complete and cut at the end: [group, 2, length]."""
    seen = runs.opened
    flat = (group[seen] * 2 + ~runs.closed[seen]) * span + runs.length[seen] - 1
    return np.bincount(flat, minlength=size * 2 * span).reshape(size, 2, span)


def by_chance(pieces: Segments, runs: Stretches, n: int, layers: int) -> np.ndarray:
    """Stretches expected after a shuffle, and seen, where something can be shuffled: [question, layer, 2]."""
    mixed = np.zeros(n * layers, dtype=bool)
    mixed[pieces.row[pieces.mixed]] = True
    # A row in several pieces, some of them all stable: those count alike on both sides.
    expected = np.bincount(pieces.row, np.where(pieces.k < pieces.n, pieces.expected, 0), n * layers)
    seen = np.bincount(runs.row, minlength=n * layers)
    return np.where(mixed[:, None], np.stack([expected, seen], axis=-1), 0).reshape(n, layers, 2)
