"""One comparison and one pair of depths as an array: overlap [question, position, layer].

For analyses that follow a question along its positions, or set the same position of two questions side by
side. A cell without a pair (the text has ended, or the overlap is NaN) is NaN. Comparisons are never pooled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.basin_shifts import threshold_of
from sst_interp.analyses.overlap import RESOLUTION, overlap_distribution, overlap_of, select
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    cluster_bootstrap,
    none_seen_bound,
    ratio,
)
from sst_interp.analyses.statistics.modes import to_v
from sst_interp.choices import Choices
from sst_interp.errors import SSTError


class Grid(NamedTuple):
    """Overlaps of one comparison and one pair; all axes ascending."""

    overlap: np.ndarray
    """[question, position, layer] float64; NaN where there is none."""
    questions: np.ndarray
    """Index of each question in the run."""
    positions: np.ndarray
    """Generated position of each column."""
    layers: np.ndarray
    a: int
    b: int
    kind: str

    @property
    def there(self) -> np.ndarray:
        """Whether a cell has an overlap, bool [question, position, layer]."""
        return np.isfinite(self.overlap)

    def shifted(self, threshold: float) -> np.ndarray:
        """Whether a cell's overlap is below the threshold, bool [question, position, layer]."""
        return self.overlap < threshold  # NaN is not

    def distance(self) -> np.ndarray:
        """log(1 - overlap + r) of every cell, with the resolution r of `overlap.RESOLUTION`.

        Overlaps crowd at 1 and differ there by factors: on this scale they spread evenly. Larger is further.
        """
        v = to_v(np.where(self.there, self.overlap, 1.0), RESOLUTION[self.kind])
        return np.where(self.there, v, np.nan)

    def mean_distance(self) -> np.ndarray:
        """Mean of `distance` over layers, each centred first: [question, position]; NaN without pairs."""
        there, v = self.there, self.distance()
        filled = np.where(there, v, 0)
        filled -= np.where(there, filled.sum(axis=(0, 1)) / np.maximum(there.sum(axis=(0, 1)), 1), 0)
        return ratio(np.stack([filled.sum(axis=-1), there.sum(axis=-1)], axis=-1))

    def shifted_share(self, threshold: float) -> np.ndarray:
        """Share of the layers that shifted: [question, position]; NaN without pairs."""
        return ratio(np.stack([self.shifted(threshold).sum(-1), self.there.sum(-1)], -1).astype(float))

    def of_table(self, table: pd.DataFrame, column: str) -> np.ndarray:
        """A column of a table with a row per (question, position), on this grid: NaN where it has none."""
        rows = pd.Index(self.questions).get_indexer(pd.Index(table["question"]))
        columns = pd.Index(self.positions).get_indexer(pd.Index(table["position"]))
        here = (rows >= 0) & (columns >= 0)
        found = np.full(self.overlap.shape[:2], np.nan)
        found[rows[here], columns[here]] = table[column].to_numpy(dtype=float, na_value=np.nan)[here]
        return np.where(self.there.any(axis=-1), found, np.nan)

    def of_questions(self, rows: np.ndarray) -> Grid:
        """The same for some questions, in the order given."""
        return self._replace(overlap=self.overlap[rows], questions=self.questions[rows])

    def where_also(self, other: Grid) -> Grid:
        """The same, cut to the cells that `other` has, too: its questions are this one's, in the same order.
        A text that is longer here has no say then.
        """
        mine, theirs = (
            np.isin(a, b) for a, b in ((self.positions, other.positions), (other.positions, self.positions))
        )
        both = self.overlap[:, mine]
        return self._replace(
            overlap=np.where(other.there[:, theirs], both, np.nan), positions=self.positions[mine]
        )


def question_grid(
    pairs: pd.DataFrame, comparison: str, a: int | None = None, b: int | None = None, kind: str = "cosine"
) -> Grid:
    """The grid of one comparison and one pair (default: the deepest). Linear in the rows.

    Raises:
        SSTError: if there are no such rows, none has an overlap, or the overlap was not captured.
    """
    rows, a, b = select(pairs, comparison, a, b)
    values = overlap_of(rows, kind)
    there = np.isfinite(values)
    if not there.any():
        raise SSTError(f"all {len(rows):,} overlaps of comparison {comparison!r} are NaN")
    axes = [pd.factorize(rows[c].to_numpy()[there], sort=True) for c in ("question", "position", "layer")]
    (q, questions), (p, positions), (layer, layers) = axes
    overlap = np.full((len(questions), len(positions), len(layers)), np.nan)
    overlap[q, p, layer] = values[there]
    return Grid(overlap, questions, positions, layers, a, b, kind)


def shift_threshold(
    pairs: pd.DataFrame,
    comparison: str,
    choices: Choices,
    threshold: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, str]:
    """The threshold of shifts and where it comes from: what is given, else what `basin_shifts` would use."""
    if threshold is not None:
        return float(threshold), "given"
    found = overlap_distribution(pairs, comparison, choices.overlap, resamples=resamples, seed=seed)
    return threshold_of(found, choices)


def same_questions(
    one: Grid, other: Grid, ids: pd.DataFrame | None = None, other_ids: pd.DataFrame | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of two grids are the same question: two index arrays of equal length.

    Args:
        one: the grid of one run.
        other: of another run.
        ids: the first run's `questions` table, to pair by the dataset's record id. Without both tables
            questions are paired by their index in the run.
        other_ids: of the other run.
    """
    sides = []
    for grid, table in ((one, ids), (other, other_ids)):
        keys: pd.Series = pd.Series(grid.questions)
        if ids is not None and other_ids is not None and table is not None:
            keys = keys.map(table.drop_duplicates("question").set_index("question")["id"])
        side = pd.DataFrame({"key": keys, "row": np.arange(len(keys))}).dropna()
        sides.append(side.drop_duplicates("key", keep=False))  # an id that two questions share names neither
    common = sides[0].merge(sides[1], on="key")
    return common["row_x"].to_numpy(dtype=int), common["row_y"].to_numpy(dtype=int)


def mean_over_questions(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one number per question, resampling questions; NaN questions are left out."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return cluster_bootstrap(np.stack([values, np.ones(len(values))], 1), resamples=resamples, seed=seed)


def share_of_questions(flags: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Share of questions for which something holds: flags [question], 0, 1, or NaN where it is not known.

    Where it holds for all or for none a bootstrap gives an interval without width; its other end is then
    the one-sided exact bound (`none_seen_bound`).
    """
    found = mean_over_questions(flags, resamples, seed)
    if found.n_questions < 2 or found.estimate not in (0.0, 1.0):
        return found
    bound = none_seen_bound(found.n_questions)
    low, high = (0.0, bound) if found.estimate == 0 else (1 - bound, 1.0)
    return Interval(found.estimate, low, high, found.n_questions, found.level)
