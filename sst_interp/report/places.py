"""Where the explorer's numbers stand: a row of a table as an index into flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Places:
    """Where a row of a table stands in the flat arrays."""

    questions: np.ndarray
    lengths: np.ndarray
    layers: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """First position of each question, in positions."""
        return np.concatenate([[0], np.cumsum(self.lengths)])[:-1]

    def positions(self, rows: pd.DataFrame) -> np.ndarray:
        """Index into the arrays [question, position]."""
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        return self.starts[q] + rows["position"].to_numpy(dtype=np.int64)

    def cells(self, rows: pd.DataFrame) -> np.ndarray:
        """Index into the arrays [question, layer, position]."""
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        layer = np.searchsorted(self.layers, rows["layer"].to_numpy())
        inside = layer * self.lengths[q] + rows["position"].to_numpy(dtype=np.int64)
        return self.starts[q] * len(self.layers) + inside

    def empty(self, per_position: int | None = None, dtype: type = np.uint16) -> np.ndarray:
        """Zeros ("missing") for every cell, or `per_position` for every position."""
        size = int(self.lengths.sum()) * (len(self.layers) if per_position is None else per_position)
        return np.zeros(size, dtype=dtype)

    def put(self, at: np.ndarray, codes: np.ndarray, per_position: int | None = None) -> np.ndarray:
        """The codes where they belong."""
        array = self.empty(per_position, codes.dtype.type)
        array[at] = codes
        return array

    def inside(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows that have a place."""
        rows = rows[rows["question"].isin(self.questions).to_numpy(dtype=bool)]
        q = np.searchsorted(self.questions, rows["question"].to_numpy())
        return rows[rows["position"].to_numpy() < self.lengths[q]]
