"""Stretches of stable positions between shifts: how long they are, and how long a shuffle would make them.

One row is one question and one layer, its positions in order. A stretch is a longest sequence of neighbouring
stable positions. It is *complete* if a shift stands on both sides; a text's beginning and end cut stretches
short (censoring), and so does a position without an overlap.

**Censoring.** Long stretches are cut more often than short ones, so the median of the complete ones is too
small. `median_length` is Kaplan and Meier's, over the stretches that begin after a shift: one that the end of
the text cuts counts as "at least this long". What a text begins with has no known beginning and is left out.

**The shuffle.** Shuffling the positions of a row keeps its number of shifts and where the text ends. Of n
positions with k shifts all arrangements are as likely, and the k + 1 gaps beside the shifts are alike, so

    P(a gap holds L positions) = C(n - L - 1, k - 1) / C(n, k)        expected stretches = (n - k) (k + 1) / n

are exact, and nothing has to be drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

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
