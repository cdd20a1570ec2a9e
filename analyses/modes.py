"""One mode or two: the antimode of a run's overlaps (claim C2), and a test of whether it is there.

**The coordinate.** Overlaps crowd at 1 and differ there by factors, so they are smoothed in

    v = log(1 - overlap + r)

with a Gaussian kernel of standard deviation h: an overlap is smeared by the fraction h of its distance
from 1. `r` is the resolution: overlaps that differ by less count as one place, so that float and bf16
rounding, or a layer that sits at 0.9999 beside one at 0.9995, make no "modes".

**Which density.** Modes are not invariant under a change of coordinate. The paper speaks of overlap
itself, so modes are counted in the density *per unit of overlap*, f(overlap) = f_v / (1 - overlap + r)
(a transformation kernel estimate: Wand, Marron & Ruppert 1991). The density of v itself would be the
wrong one: a stable mode with 14% uniform noise below it has no second mode, but in v the uniform part
rises exponentially and ends at a cliff, which looks like one. A dip per unit of overlap is the stricter
claim. `sensitivity` reports both, at half, one and two times the bandwidth.

**The statistic.** At a place t the relative depth is 1 - f(t) / min(highest f above t, highest f below
t); the antimode is the deepest place with at least `MIN_SHARE` of the pairs on each side. The depth of
a one-moded density is 0.

**The test.** Pairs are clustered in questions, and a clump of a few questions is a dip in most bootstrap
resamples of that same clump: "the dip is in 95% of resamples" alone called 40% to 93% of simulated one-
moded runs of 5 to 24 questions with uniform, position-clustered noise two-moded. So the dip is compared
with dips that question sampling makes in a run that has one mode: the nearest one-moded density (isotonic
regression on both sides of the highest mode, so the dip is filled in flat, the hardest case) plus the
deviations f* - f of the question bootstrap. Two modes are counted if p < 0.05 *and* the depth exceeds
`MIN_DEPTH` in 95% of plain question resamples. In simulations of 24 to 100 questions 0% to 3% of one-moded
runs passed, and 78% to 100% of runs with a planted second mode of 5% to 30% of the pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from sst_interp.analyses.statistics import LEVEL, RESAMPLES, Interval, resample_weights

BINS = 256
BANDWIDTH = 0.2
"""Kernel standard deviation in v. Fixed, not fitted: rules that shrink with the number of pairs
undersmooth clustered pairs, and rules that grow with the spread blur two modes into one. The null of the
test is smoothed alike, so the bandwidth decides the power, not the rate of false alarms."""
MIN_SHARE = 0.01
"""A mode with fewer of the pairs than this is not counted."""
MIN_DEPTH = 0.25
"""A dip must go this far below the lower of its two peaks, in `LEVEL` of the question resamples."""
MIN_QUESTIONS = 8
"""With fewer questions the null was exceeded too often (up to 10% with 5), so the test is not made."""
LARGEST = 2.0
"""Largest 1 - overlap on the grid; what exceeds it (a relative L2 above 2) counts in the last bin."""

Coordinate = Literal["overlap", "log"]


@dataclass(frozen=True)
class Modes:
    """How many modes a distribution of overlaps has, and where it divides."""

    two: bool
    """Whether two modes are counted."""
    antimode: Interval | None
    """The overlap between the two modes, with its question-level interval; None with one mode."""
    at: tuple[float, ...]
    """Overlap at each mode counted, highest overlap first."""
    depth: float
    """Relative depth of the deepest dip, 0 to 1."""
    p_value: float
    """Chance of so deep a dip if there is one mode; NaN if not tested."""
    share_of_resamples: float
    """Share of question resamples in which the dip is deeper than `MIN_DEPTH`; NaN if not tested."""
    reason: str
    """The decision in words."""

    @property
    def count(self) -> str:
        """`two`, `one`, or `not tested`."""
        return "two" if self.two else "not tested" if math.isnan(self.p_value) else "one"


def grid(resolution: float) -> np.ndarray:
    """Bin edges in v = log(1 - overlap + resolution), from overlap 1 to overlap -1: [BINS + 1]."""
    return np.linspace(np.log(resolution), np.log(LARGEST + resolution), BINS + 1)


def to_v(overlap: np.ndarray, resolution: float) -> np.ndarray:
    """Overlap -> v; overlaps above 1 (rounding) count as 1."""
    return np.log(np.clip(1 - np.asarray(overlap, dtype=float), 0, LARGEST) + resolution)


def to_overlap(v: np.ndarray | float, resolution: float) -> np.ndarray:
    """The inverse of `to_v`."""
    return 1 + resolution - np.exp(v)


def question_histograms(codes: np.ndarray, overlap: np.ndarray, resolution: float) -> np.ndarray:
    """Pairs per question and bin: codes [pair] in 0..n-1, overlap [pair] -> [question, BINS]. Linear."""
    edges = grid(resolution)
    bins = ((to_v(overlap, resolution) - edges[0]) * (BINS / (edges[-1] - edges[0]))).astype(np.int64)
    n = int(codes.max()) + 1
    flat = codes * BINS + np.clip(bins, 0, BINS - 1)
    return np.bincount(flat, minlength=n * BINS).reshape(n, BINS).astype(float)


def smoothing(edges: np.ndarray, bandwidth: float) -> np.ndarray:
    """Gaussian kernel [from bin, to bin], reflected at both ends of the grid, rows summing to 1."""
    centres = (edges[1:] + edges[:-1]) / 2
    kernel = sum(
        np.exp(-0.5 * ((image[:, None] - centres) / bandwidth) ** 2)
        for image in (centres, 2 * edges[0] - centres, 2 * edges[-1] - centres)
    )
    return np.asarray(kernel) / np.sum(kernel, axis=1, keepdims=True)


def deepest_dip(density: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin and relative depth of the deepest dip: density, mass [..., bin] -> [...], [...]."""
    above = np.maximum.accumulate(density, axis=-1)
    below = np.maximum.accumulate(density[..., ::-1], axis=-1)[..., ::-1]
    peak = np.minimum(above, below)
    depth = 1 - np.divide(density, peak, out=np.ones_like(density), where=peak > 0)
    share = np.cumsum(mass, axis=-1) / mass.sum(axis=-1, keepdims=True)
    depth = np.where((share >= MIN_SHARE) & (share <= 1 - MIN_SHARE), depth, 0.0)
    place = depth.argmax(axis=-1)
    return place, np.take_along_axis(depth, place[..., None], -1)[..., 0]


def one_moded(density: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The nearest density that rises to the highest mode and falls after it: [bin] -> [bin]."""
    top = int(density.argmax())
    rising = isotonic_regression(density[: top + 1], weights=width[: top + 1]).x
    falling = isotonic_regression(density[top:], weights=width[top:], increasing=False).x
    return np.concatenate([rising[:-1], falling])


def find_modes(
    histograms: np.ndarray,
    resolution: float,
    bandwidth: float = BANDWIDTH,
    coordinate: Coordinate = "overlap",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Modes:
    """Count the modes and test the antimode (the method is described at the top of this module).

    Args:
        histograms: [question, BINS] on `grid(resolution)`.
        resolution: r.
        bandwidth: h, in units of v.
        coordinate: density per unit of "overlap" (the decision), or of v ("log", a sensitivity check).
        resamples: question resamples.
        seed: of the resampling.
    """
    edges = grid(resolution)
    centres = (edges[1:] + edges[:-1]) / 2
    width = np.diff(np.exp(edges)) if coordinate == "overlap" else np.diff(edges)
    smooth = histograms @ smoothing(edges, bandwidth)
    mass = smooth.sum(axis=0) / smooth.sum()
    density = mass / width
    place, depth = (v.item() for v in deepest_dip(density, mass))
    top = float(to_overlap(centres[density.argmax()], resolution))
    n = len(histograms)
    nan = float("nan")
    if n < MIN_QUESTIONS:
        reason = f"too few questions ({n}, at least {MIN_QUESTIONS} are needed) to test for two modes"
        return Modes(False, None, (top,), depth, nan, nan, reason)

    weights = resample_weights(n, resamples, seed).astype(float)
    masses = weights @ smooth
    masses /= masses.sum(axis=1, keepdims=True)
    densities = masses / width
    places, depths = deepest_dip(densities, masses)
    null = np.maximum(one_moded(density, width) + densities - density, 0)
    _, null_depths = deepest_dip(null, null * width)
    p = (1 + np.count_nonzero(null_depths >= depth - 1e-12)) / (1 + resamples)
    share = float(np.mean(depths > MIN_DEPTH))
    if not (p < 1 - LEVEL and share >= LEVEL and depth > MIN_DEPTH):
        reason = f"the distribution has one mode (deepest dip {depth:.0%}, p = {p:.2g})"
        return Modes(False, None, (top,), depth, p, share, reason)
    tail = 100 * (1 - LEVEL) / 2
    drawn = to_overlap(centres[places[depths > MIN_DEPTH]], resolution)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    antimode = Interval(float(to_overlap(centres[place], resolution)), float(low), float(high), n)
    peaks = density[:place].argmax(), place + density[place:].argmax()
    at = tuple(float(to_overlap(centres[i], resolution)) for i in peaks)
    reason = f"two modes (dip {depth:.0%} below the lower one, p = {p:.2g})"
    return Modes(True, antimode, at, depth, p, share, reason)


def sensitivity(histograms: np.ndarray, resolution: float, resamples: int = 500) -> pd.DataFrame:
    """The count of modes for both coordinates at half, one and two times the bandwidth: 6 rows."""
    rows = []
    for coordinate in ("overlap", "log"):
        for factor in (0.5, 1, 2):
            modes = find_modes(histograms, resolution, factor * BANDWIDTH, coordinate, resamples)
            rows.append(
                {
                    "density per unit of": "overlap" if coordinate == "overlap" else "log(1 - overlap)",
                    "bandwidth": factor * BANDWIDTH,
                    "modes": 2 if modes.two else 1,
                    "antimode": modes.antimode.estimate if modes.antimode else float("nan"),
                    "depth": modes.depth,
                    "p": modes.p_value,
                }
            )
    return pd.DataFrame(rows)
