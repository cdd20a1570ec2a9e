"""One mode or two: the antimode of a run's overlaps (claim C2), and two tests of whether it is there.

**The density.** Overlaps crowd at 1 and differ there by factors, so they are smoothed with a Gaussian kernel
in

    v = log(1 - overlap + r)

The resolution r says which differences are rounding. Modes are counted per unit of overlap,
f(overlap) = f_v / (1 - overlap + r) (Wand, Marron & Ruppert 1991): in v, uniform noise below one mode rises
exponentially and ends at a cliff, which looks like a second.

**The valley.** Water stands up to the lower of the highest peaks on both sides of a place, level(t) =
min(highest f above t, highest f below t). A valley's missing mass is the share of the pairs that would fill
it, sum of (level - f) width; its depth is 1 - f / level at the lowest place, the antimode.

**The test** (`find_modes`). The largest valley is compared with those that question sampling makes in the
nearest one-moded density: isotonic regression on both sides of the highest mode, plus the deviations f* - f
of the question bootstrap. Two modes are counted if p < 0.05, at least `MIN_SHARE` of the pairs is missing,
and the depth exceeds `MIN_DEPTH` in 95% of the resamples. In simulations of 16 to 100 questions 0% to 8% of
one-moded runs passed (up to 12% with 8 questions), and 78% to 100% of runs with a second mode of 5% to 30% of
the pairs.

**The dip** (`dip_test`; Hartigan & Hartigan 1985; optional: `pip install diptest`, which is under the GPL).
Its table is for independent observations, so `p_value` is for subsamples of one pair per question: twice the
median over subsamples (Rueger 1978). `p_questions` is for all pairs, against the same one-moded null as
above; in simulations with one mode it was below 0.05 in 7% to 8% of the runs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from sst_interp.analyses.statistics.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    nothing,
    resample_weights,
    resampled,
)

MIN_SHARE = 0.01
"""A mode with fewer of the pairs than this is not counted, and no valley is looked for beyond it."""


class Valley(NamedTuple):
    """The largest valley of each of several densities [...]."""

    place: np.ndarray
    """Bin of its lowest place."""
    depth: np.ndarray
    """How far that lies below the lower peak, 0 (there is no valley) to 1."""
    missing: np.ndarray
    """Missing mass, over the mass of the whole density."""


def water_level(density: np.ndarray) -> np.ndarray:
    """How high water stands: density [..., bin] -> [..., bin], never below the density."""
    above = np.maximum.accumulate(density, axis=-1)
    below = np.maximum.accumulate(density[..., ::-1], axis=-1)[..., ::-1]
    return np.minimum(above, below, out=above)


def missing_mass(density: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Missing mass of the largest valley: density [..., bin], width [bin] -> [...]."""
    return _filling(density, width, water_level(density))[0].max(axis=-1)


def largest_valley(density: np.ndarray, width: np.ndarray, level: np.ndarray | None = None) -> Valley:
    """The valley with the largest missing mass: density [..., bin], width [bin].

    `level` is `water_level(density)`, if it is known.
    """
    level = water_level(density) if level is None else level
    filling, wet = _filling(density, width, level)
    end = filling.argmax(axis=-1)[..., None]
    missing = np.take_along_axis(filling, end, -1)[..., 0]
    bins = np.arange(density.shape[-1])
    start = np.take_along_axis(np.maximum.accumulate(np.where(wet, -1, bins), axis=-1), end, -1)
    height = np.divide(density, level, out=np.ones_like(density), where=wet & (bins > start) & (bins <= end))
    place = height.argmin(axis=-1)
    depth = 1 - np.take_along_axis(height, place[..., None], -1)[..., 0]
    return Valley(place, depth, missing)


def _filling(density: np.ndarray, width: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass missing from the valley's beginning up to each bin, and which bins hold water: both [..., bin]."""
    share = np.cumsum(density * width, axis=-1)
    total = share[..., -1:]
    wet = (level > density) & (share >= MIN_SHARE * total) & (share <= (1 - MIN_SHARE) * total)
    filled = np.cumsum(np.where(wet, (level - density) * width, 0), axis=-1)
    before = np.maximum.accumulate(np.where(wet, 0, filled), axis=-1)
    return (filled - before) / np.maximum(total, np.finfo(density.dtype).tiny), wet


BINS = 256
BANDWIDTH = 0.2
"""Kernel standard deviation in v. Fixed, since fitted ones undersmooth clustered pairs or blur two modes. The
null is smoothed alike, so it decides the power and not the rate of false alarms."""
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
    """Relative depth of the largest valley, 0 to 1."""
    p_value: float
    """Chance of so large a valley if there is one mode; NaN if not tested."""
    share_of_resamples: float
    """Share of question resamples in which the valley is deeper than `MIN_DEPTH`; NaN if not tested."""
    reason: str
    """The decision in words."""
    depth_interval: Interval | None = None
    """The antimode depth: `depth`, with how deep that same place is when questions are resampled. None if not
    tested."""
    missing: float = math.nan
    """Share of the pairs that is missing in the valley: what would have to be added to leave one mode."""

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


def question_histograms(
    codes: np.ndarray, overlap: np.ndarray, resolution: float, n: int | None = None
) -> np.ndarray:
    """Pairs per question and bin: codes [pair] in 0..n-1, overlap [pair] -> [question, BINS]. Linear."""
    edges = grid(resolution)
    bins = ((to_v(overlap, resolution) - edges[0]) * (BINS / (edges[-1] - edges[0]))).astype(np.int64)
    n = int(codes.max()) + 1 if n is None else n
    flat = codes * BINS + np.clip(bins, 0, BINS - 1)
    return np.bincount(flat, minlength=n * BINS).reshape(n, BINS).astype(float)


@lru_cache(maxsize=16)
def smoothing(resolution: float) -> np.ndarray:
    """Gaussian kernel [from bin, to bin] on `grid`, reflected at both ends, rows summing to 1. Read-only."""
    edges = grid(resolution)
    centres = (edges[1:] + edges[:-1]) / 2
    kernel = np.zeros((BINS, BINS))
    for image in (centres, 2 * edges[0] - centres, 2 * edges[-1] - centres):
        kernel += np.exp(-0.5 * ((image[:, None] - centres) / BANDWIDTH) ** 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    kernel.flags.writeable = False
    return kernel


def one_moded(density: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The nearest density that rises to the highest mode and falls after it: [bin] -> [bin]."""
    top = int(density.argmax())
    rising = isotonic_regression(density[: top + 1], weights=width[: top + 1]).x
    falling = isotonic_regression(density[top:], weights=width[top:], increasing=False).x
    return np.concatenate([rising[:-1], falling])


def find_modes(
    histograms: np.ndarray,
    resolution: float,
    coordinate: Coordinate = "overlap",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Modes:
    """Count the modes and test the antimode (the method is described at the top of this module).

    Args:
        histograms: [question, BINS] on `grid(resolution)`.
        resolution: r.
        coordinate: density per unit of "overlap" (the decision), or of v ("log", for comparison).
        resamples: question resamples.
        seed: of the resampling.
    """
    edges = grid(resolution)
    centres = (edges[1:] + edges[:-1]) / 2
    width = np.diff(np.exp(edges)) if coordinate == "overlap" else np.diff(edges)
    smooth = histograms @ smoothing(resolution)
    mass = smooth.sum(axis=0) / smooth.sum()
    density = mass / width
    place, depth, missing = (v.item() for v in largest_valley(density, width))
    top = float(to_overlap(centres[density.argmax()], resolution))
    n = len(histograms)
    nan = float("nan")
    if n < MIN_QUESTIONS:
        reason = f"too few questions ({n}, at least {MIN_QUESTIONS} are needed) to test for two modes"
        return Modes(False, None, (top,), depth, nan, nan, reason, None, missing)

    # Single precision: half the memory to move, and six digits are more than the bins have.
    weights = resample_weights(n, resamples, seed).astype(np.float32)
    masses = weights @ smooth.astype(np.float32)
    masses /= np.maximum(masses.sum(axis=1, keepdims=True), np.float32(1e-30))
    widths = width.astype(np.float32)
    densities = masses / widths
    level = water_level(densities)
    places, depths, _ = largest_valley(densities, widths, level)
    water = level[:, place]
    there = 1 - np.divide(densities[:, place], water, out=np.ones_like(water), where=water > 0)
    tail = 100 * (1 - LEVEL) / 2
    ends = np.percentile(there, [tail, 100 - tail])
    interval = Interval(depth, min(float(ends[0]), depth), max(float(ends[1]), depth), n)
    densities += (one_moded(density, width) - density).astype(np.float32)
    null = missing_mass(np.maximum(densities, 0, out=densities), widths)
    p = float((1 + np.count_nonzero(null >= missing - 1e-6)) / (1 + resamples))
    share = float(np.mean(depths > MIN_DEPTH))
    if not (p < 1 - LEVEL and missing >= MIN_SHARE and share >= LEVEL and depth > MIN_DEPTH):
        small = ", too small to count" if p < 1 - LEVEL else ""
        reason = f"the distribution has one mode (deepest dip {depth:.0%}, p = {p:.2g}{small})"
        return Modes(False, None, (top,), depth, p, share, reason, interval, missing)
    drawn = to_overlap(centres[places[depths > MIN_DEPTH]], resolution)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    antimode = Interval(float(to_overlap(centres[place], resolution)), float(low), float(high), n)
    peaks = density[:place].argmax(), place + density[place:].argmax()
    at = tuple(float(to_overlap(centres[i], resolution)) for i in peaks)
    reason = f"two modes (dip {depth:.0%} below the lower one, p = {p:.2g})"
    return Modes(True, antimode, at, depth, p, share, reason, interval, missing)


SUBSAMPLES = 101
"""Subsamples of one pair per question."""
DIP_RESAMPLES = 200
"""Question resamples of the dip."""
POINTS = 250
"""Quantiles at which the dip of a whole distribution is taken; it is exact to 1 / POINTS."""
NOT_INSTALLED = "not installed: pip install diptest"


@dataclass(frozen=True)
class DipTest:
    """How far a distribution is from having one mode, and whether that could be chance."""

    dip: Interval
    """The dip of the whole distribution; resampling questions makes it larger on average, as a distance."""
    p_value: float
    """Chance of such dips with one mode, from one pair per question; NaN if not tested."""
    p_questions: float
    """The same from all pairs, against question sampling of the nearest one-moded density."""
    reason: str | None = None
    """Why it was not tested; None if it was."""


def dip_test(histograms: np.ndarray, resolution: float, seed: int = 0) -> DipTest:
    """Test one distribution for one mode.

    Args:
        histograms: [question, BINS] on `modes.grid(resolution)`.
        resolution: r.
        seed: of the subsamples and resamples.
    """
    histograms = histograms[histograms.sum(axis=1) > 0]
    n = len(histograms)
    try:
        package = importlib.import_module("diptest")
    except ImportError:
        return untested(NOT_INSTALLED, n)
    if n < MIN_QUESTIONS:
        return untested(f"too few questions ({n}, at least {MIN_QUESTIONS} are needed)", n)
    equal = histograms / histograms.sum(axis=1, keepdims=True)
    subsamples = np.sort(one_per_question(equal, resolution, seed), axis=1)
    # The p-value falls with the dip: the median of one is the median of the other.
    middle = np.argsort([package.dipstat(each, sort_x=False) for each in subsamples])[SUBSAMPLES // 2]
    p_value = float(package.diptest(subsamples[middle])[1])
    masses = equal @ smoothing(resolution) / n
    mass, width = masses.sum(axis=0), np.diff(np.exp(grid(resolution)))
    resamples = resampled(masses, DIP_RESAMPLES, seed)
    null = np.maximum(one_moded(mass / width, width) * width + resamples - mass, 0)
    whole = float(_dips(package.dipstat, mass[None], resolution)[0])
    drawn, by_chance = (_dips(package.dipstat, each, resolution) for each in (resamples, null))
    exceeded = np.count_nonzero(by_chance >= whole - 1e-9)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    dip = Interval(whole, min(float(low), whole), max(float(high), whole), n)
    p_questions = (1 + exceeded) / (1 + DIP_RESAMPLES)
    return DipTest(dip, min(1.0, 2 * p_value), p_questions)


def one_per_question(equal: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """One overlap from every question, many times: shares [question, BINS] -> [subsample, question]."""
    rng = np.random.default_rng(seed)
    n = len(equal)
    # Each question's distribution function, one above the other: a search finds the bin in all of them.
    rising = (np.cumsum(equal, axis=1) / equal.sum(axis=1, keepdims=True) + np.arange(n)[:, None]).ravel()
    drawn = rng.random((SUBSAMPLES, n)) + np.arange(n)
    index = np.searchsorted(rising, drawn, side="right") - BINS * np.arange(n)
    edges = grid(resolution)
    step = edges[1] - edges[0]
    v = edges[np.clip(index, 0, BINS - 1)] + step * rng.random(index.shape)
    v = v + BANDWIDTH * rng.normal(size=v.shape)
    v = edges[0] + np.abs(v - edges[0])  # reflected at both ends, as the kernel is
    v = edges[-1] - np.abs(edges[-1] - v)
    return to_overlap(v, resolution)


def _dips(dipstat: Callable[..., float], masses: np.ndarray, resolution: float) -> np.ndarray:
    """The dip of each histogram [..., BINS], through its quantiles."""
    rising = np.pad(np.cumsum(masses, axis=-1), ((0, 0), (1, 0)))
    wanted, edges = (np.arange(POINTS) + 0.5) / POINTS, grid(resolution)
    v = np.stack([np.interp(wanted * each[-1], each, edges) for each in rising])
    overlap = np.ascontiguousarray(to_overlap(v, resolution)[:, ::-1])  # ascending
    return np.array([dipstat(each, sort_x=False) for each in overlap])


def untested(reason: str, n: int) -> DipTest:
    """No dip test, and why."""
    return DipTest(nothing(reason, n), math.nan, math.nan, reason)
