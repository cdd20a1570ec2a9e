"""The valleys of a density: where it would hold water, how deep, and how much is missing to fill them.

Water stands at a place up to the lower of the highest peaks on its two sides,

    level(t) = min(highest f above t, highest f below t)

so a one-moded density holds none. A valley is a stretch of bins that hold water. Its *missing mass*, the sum
of (level - f) width over the valley, is the share of the pairs that would have to be added to leave one mode;
its *depth* is 1 - f / level at its lowest place. Missing mass is what says whether a valley is there: in a
thin tail, next to a tall peak, a few pairs make dips of any depth, but hardly any mass is missing in them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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
