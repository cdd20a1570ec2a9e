"""Mixtures of normal components on a bounded axis, fitted to counts per bin by EM, many at once.

What a component would have outside the range of the axis is missing data, filled in with its expectation
(Dempster, Laird & Rubin 1977), so a hump that the end of the range cuts in half is one component. The cost is
in bins, not in observations. Every function takes any number of fits as leading axes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

STEPS = 100
"""EM steps; four times as many change the held-out likelihood by less than 0.01 nats per observation."""
STARTS = (0.5, 0.8, 0.95)
"""Two components start on both sides of these quantiles; the likeliest fit of the three is kept."""


class Axis(NamedTuple):
    """Where the bins are; ascending, touching, of any width."""

    centre: np.ndarray
    width: np.ndarray


class Fit(NamedTuple):
    """A mixture, or several."""

    parts: np.ndarray
    """Share of each component in each bin, [..., component, bin]; a mixture's sum to 1."""
    mean: np.ndarray
    """Mean of each component, were it not cut off: [..., component]."""

    @property
    def shares(self) -> np.ndarray:
        """Share of the whole mixture in each bin, [..., bin]."""
        return self.parts.sum(axis=-2)

    @property
    def weights(self) -> np.ndarray:
        """Share of each component within the range, [..., component]."""
        return self.parts.sum(axis=-1)


def likeliest_fit(counts: np.ndarray, axis: Axis, components: int) -> Fit:
    """One or two components for each of several histograms: counts [..., bin]."""
    cumulative = np.cumsum(counts, axis=-1)

    def place(q: float) -> np.ndarray:
        index = (cumulative < q * cumulative[..., -1:]).sum(axis=-1)
        return axis.centre[np.minimum(index, len(axis.centre) - 1)]

    tries = [(0.5,)] if components == 1 else [(q / 2, (1 + q) / 2) for q in STARTS]
    starts = np.stack([np.stack([place(q) for q in each], axis=-1) for each in tries])
    found = fit(np.broadcast_to(counts, (len(tries), *counts.shape)), axis, starts)
    likelihood = (counts * np.log(np.maximum(found.shares, 1e-300))).sum(axis=-1)
    best = likelihood.argmax(axis=0)[None, ..., None]
    mean = np.take_along_axis(found.mean, best, axis=0)[0]
    return Fit(np.take_along_axis(found.parts, best[..., None], axis=0)[0], mean)


def fit(counts: np.ndarray, axis: Axis, starts: np.ndarray) -> Fit:
    """EM from given means: counts [..., bin], starts [..., component]."""
    x = axis.centre
    # Nothing is narrower than a typical bin, and no mean further out than the range is wide.
    narrowest, low, high = np.median(axis.width), 2 * x[0] - x[-1], x[-1]
    moments = np.stack([np.ones_like(x), x, x**2], axis=-1)
    n, first, second = (part[..., None] for part in np.moveaxis(counts @ moments, -1, 0))
    spread = np.sqrt(np.maximum(second / np.maximum(n, 1) - (first / np.maximum(n, 1)) ** 2, 0))
    mean = starts.astype(float)
    deviation = np.maximum(spread, narrowest) / mean.shape[-1] + np.zeros_like(mean)
    weight = np.full(mean.shape, 1 / mean.shape[-1])
    for _ in range(STEPS):
        each = _probabilities(axis, mean, deviation)
        joint = weight[..., None] * each
        total = joint.sum(axis=-2)
        per_share = np.divide(counts, total, out=np.zeros_like(total), where=total > 0)
        seen = (joint * per_share[..., None, :]) @ moments
        whole = np.stack([np.ones_like(mean), mean, mean**2 + deviation**2], axis=-1)
        outside = (weight * n / np.maximum(total.sum(axis=-1), 1e-6)[..., None])[..., None]
        seen += outside * (whole - each @ moments)
        size = np.maximum(seen[..., 0], 1e-9)
        weight = size / size.sum(axis=-1, keepdims=True)
        mean = np.clip(seen[..., 1] / size, low, high)
        deviation = np.sqrt(np.clip(seen[..., 2] / size - mean**2, narrowest**2, (high - low) ** 2))
    parts = weight[..., None] * _probabilities(axis, mean, deviation)
    return Fit(parts / np.maximum(parts.sum(axis=(-2, -1), keepdims=True), 1e-300), mean)


def _probabilities(axis: Axis, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Share of each normal component in each bin, [..., component, bin]."""
    z = (axis.centre - mean[..., None]) / deviation[..., None]
    return np.exp(-0.5 * z * z) * (axis.width / (math.sqrt(2 * math.pi) * deviation[..., None]))
