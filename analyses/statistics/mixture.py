"""One spread of overlaps or two, besides a mass at 1: mixture fits, chosen by questions left out.

Two models of the overlaps of one distribution (a layer, or a run):

    one:  at_one + (1 - at_one) N(m, s)
    two:  at_one + (1 - at_one) (w N(m1, s1) + (1 - w) N(m2, s2))

`at_one` is the share of pairs in the first bin of `modes.grid`, too near 1 to be told from it: states that
iteration left alone. Without it, that mass and one ordinary spread would pass for two components. The normal
components live in x = v = log(1 - overlap + r) (`log`: a spread is a factor of the distance from 1) or in
x = arccos(overlap) (`angle`), cut off where x ends (`truncated_normals`). They are fitted to counts per bin,
all distributions and folds at once, so the cost does not depend on the number of pairs.

**The choice.** Pairs are not independent, so a BIC over pairs would always want more components. Questions
are left out in turn; the gain is the log-likelihood of what was left out under "two" minus that under "one",
per pair away from 1. Two components are chosen if the interval of the gain, which resamples questions, is
above `MIN_GAIN`, and the smaller component has `MIN_SHARE` of the pairs and spreads over `MIN_SPREAD`
questions: what one question alone does is no component of the run.

**Two components are not two modes.** One heavy-tailed mode, or one mode with noise spread evenly below it, is
also fitted better by two normal components. `depth` is the valley of the chosen fit in the density per unit
of overlap that `modes` uses. A depth of 0 says that the two components make one hump. A large depth says
little: a normal component is a hump by assumption. Whether there is a valley is for `modes` and `dip` to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, cluster_bootstrap
from sst_interp.analyses.statistics.modes import (
    BINS,
    MIN_QUESTIONS,
    MIN_SHARE,
    grid,
    largest_valley,
    smoothing,
    to_overlap,
)
from sst_interp.analyses.statistics.truncated_normals import Axis, Fit, likeliest_fit

FOLDS = 5
MIN_GAIN = 0.05
"""Nats per pair. Two well separated components gain 0.2 or more, even if one has few of the pairs; one spread
that is merely not normal in x gains up to 0.05 (a log-normal spread of distances in `angle`)."""
MIN_SPREAD = 3.0
"""Effective number of questions."""
ELSEWHERE = 1e-3
"""Share of every held-out prediction that is spread evenly over the range, so that a component is not wanted
only because one pair in a thousand is far from everything."""

Scale = Literal["log", "angle"]


@dataclass(frozen=True)
class MixtureFit:
    """The mixture chosen for one distribution of overlaps."""

    components: int
    """1 or 2 besides the mass at 1; 0 if not tested."""
    at_one: float
    """Share of pairs that cannot be told from overlap 1 at this resolution."""
    gain: Interval
    """Log-likelihood of left-out questions, two components minus one, nats per pair away from 1."""
    centres: tuple[float, ...] = ()
    """Overlap at the middle of each component, highest first."""
    weights: tuple[float, ...] = ()
    """Share of all pairs in each component; with `at_one` they sum to 1."""
    spread: float = math.nan
    """Over how many questions the smaller of two components spreads, were two fitted: (sum of w)^2 / sum of
    w^2 of the share w of it that each question has."""
    depth: float = math.nan
    """Relative depth of the largest valley of the fitted density, 0 to 1; NaN if not fitted."""
    reason: str | None = None
    """Why nothing was fitted; None if something was."""


def away_from_1(histograms: np.ndarray) -> np.ndarray:
    """Counts of all bins but the first, two bins to one: [..., BINS] -> [..., BINS / 2]."""
    return np.add.reduceat(histograms[..., 1:], np.arange(0, histograms.shape[-1] - 1, 2), axis=-1)


def coordinate(resolution: float, scale: Scale) -> Axis:
    """The bins of `away_from_1` in x."""
    edges = grid(resolution)
    edges = np.append(edges[1::2], edges[-1])
    if scale == "angle":
        edges = np.arccos(np.clip(to_overlap(edges, resolution), -1, 1))
    return Axis((edges[1:] + edges[:-1]) / 2, np.diff(edges))


def fit_mixtures(
    histograms: np.ndarray,
    resolution: float,
    scale: Scale = "log",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[MixtureFit]:
    """Fit and choose, for each of several distributions over the same questions.

    Args:
        histograms: [distribution, question, BINS] on `modes.grid(resolution)`.
        resolution: r.
        scale: where the components are normal; "angle" is meant for the cosine.
        resamples: question resamples of the gain's interval.
        seed: of the folds and the resampling.
    """
    axis, away = coordinate(resolution, scale), away_from_1(histograms)
    n = histograms.shape[1]
    fold = np.random.default_rng(seed).permutation(n) % FOLDS
    # The last fit leaves no question out: it is the one that is shown.
    keep = (fold != np.arange(FOLDS + 1)[:, None]).astype(float)
    counts = np.moveaxis(keep @ away, 1, 0)  # [fold, distribution, bin]
    one, two = (likeliest_fit(counts, axis, components) for components in (1, 2))
    even = ELSEWHERE * axis.width / axis.width.sum()
    logs = [np.log((1 - ELSEWHERE) * each.shares + even) for each in (one, two)]
    gains = np.einsum("dqb,qdb->dq", away, (logs[1] - logs[0])[fold])
    sums = np.stack([gains, away.sum(axis=-1)], axis=-1)  # [distribution, question, 2]
    found = []
    for d, own in enumerate(histograms):
        there = sums[d, :, 1] > 0
        total = own.sum()
        at_one = float(own[:, 0].sum() / total) if total else math.nan
        reason = _untestable(total, at_one, int(there.sum()))
        if reason:
            nothing = Interval(math.nan, math.nan, math.nan, int(there.sum()), reason=reason)
            found.append(MixtureFit(0, at_one, nothing, reason=reason))
            continue
        gain = cluster_bootstrap(sums[d, there], resamples=resamples, seed=seed)
        spread = _spread(away[d], Fit(two.parts[-1, d], two.mean[-1, d]))
        small = (1 - at_one) * two.weights[-1, d].min() < MIN_SHARE or spread < MIN_SPREAD
        chosen = one if small or not gain.low > MIN_GAIN else two
        own_fit = Fit(chosen.parts[-1, d], chosen.mean[-1, d])
        found.append(_described(own_fit, at_one, gain, spread, resolution, scale))
    return found


def _spread(away: np.ndarray, two: Fit) -> float:
    """Effective number of questions in the smaller component: away [question, bin]."""
    smaller = two.parts[two.weights.argmin()]
    belongs = np.divide(smaller, two.shares, out=np.zeros_like(smaller), where=two.shares > 0)
    w = away @ belongs
    return float(w.sum() ** 2 / np.maximum((w**2).sum(), 1e-12))


def _described(
    fit: Fit, at_one: float, gain: Interval, spread: float, resolution: float, scale: Scale
) -> MixtureFit:
    """The chosen fit in terms of overlap."""
    halves = np.repeat(fit.shares, 2)[: BINS - 1] / np.append(np.full(BINS - 2, 2), 1)
    mass = np.append(at_one, (1 - at_one) * halves) @ smoothing(resolution)
    width = np.diff(np.exp(grid(resolution)))
    order = np.argsort(fit.mean)
    centres = np.cos(fit.mean) if scale == "angle" else to_overlap(fit.mean, resolution)
    return MixtureFit(
        components=len(order),
        at_one=at_one,
        gain=gain,
        centres=tuple(np.minimum(centres[order], 1).tolist()),
        weights=tuple(((1 - at_one) * fit.weights[order]).tolist()),
        spread=spread,
        depth=float(largest_valley(mass / width, width).depth),
    )


def _untestable(total: float, at_one: float, questions: int) -> str | None:
    if not total:
        return "no pairs"
    if 1 - at_one < MIN_SHARE:
        return f"fewer than {MIN_SHARE:.0%} of the pairs can be told from overlap 1"
    if questions < MIN_QUESTIONS:
        return f"too few questions with a pair away from 1 ({questions}, at least {MIN_QUESTIONS})"
    return None
