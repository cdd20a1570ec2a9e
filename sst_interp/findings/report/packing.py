"""Numbers of the explorer, packed: an array per quantity over one comparison's cells, as small as it shows.

The page's script unpacks them (`unpack.js`); `unpack` does the same in Python, for the tests.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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


MISSING, ZERO = 0, 1
"""Codes of "no number" and of exactly 0 (and anything below it)."""


@dataclass(frozen=True)
class Decimals:
    """Numbers from 10^low to 10^high by `digits` significant digits; what is outside is clipped."""

    digits: int
    low: int
    high: int

    @cached_property
    def values(self) -> np.ndarray:
        """The number of every code from 2 on, ascending; float64."""
        mantissas = range(10 ** (self.digits - 1), 10**self.digits)
        exponents = range(self.low - self.digits + 1, self.high - self.digits + 1)
        return np.array([float(f"{m}e{e}") for e in exponents for m in mantissas])

    @cached_property
    def bounds(self) -> np.ndarray:
        """Above `bounds[i]` a number rounds to `values[i + 1]` or more. Parsed from decimals, so that Python
        and JavaScript have the same ones to the last bit.
        """
        mantissas = range(10 ** (self.digits - 1), 10**self.digits)
        exponents = range(self.low - self.digits + 1, self.high - self.digits + 1)
        return np.array([float(f"{m}.5e{e}") for e in exponents for m in mantissas])[:-1]

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        """uint16 codes of non-negative numbers; NaN becomes `MISSING`, 0 and below `ZERO`."""
        numbers = np.asarray(numbers, dtype=float)
        found = 2 + np.searchsorted(self.bounds, np.nan_to_num(numbers), side="left")
        found = np.where(numbers > 0, found, ZERO)
        return np.where(np.isnan(numbers), MISSING, found).astype(np.uint16)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of codes; NaN for `MISSING`."""
        return np.concatenate([[np.nan, 0.0], self.values])[codes]

    def to_dict(self) -> dict[str, int]:
        """For the page's script."""
        return {"digits": self.digits, "low": self.low, "high": self.high}


DISTANCE = Decimals(2, -7, 3)
"""Of 1 - overlap and of relative L2."""
SIZE = Decimals(2, -3, 8)
"""Of norms."""
OUTPUT = Decimals(3, -7, 4)
"""Of entropies, margins and divergences of the output."""


def implied_l2(cosine: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Codes of the relative L2 that rounded cosine distances and norms (all codes) imply.

    |b - a|^2 / |a|^2 = (1 - s)^2 + 2 s d with s = |b| / |a| and d = 1 - cosine. Only what differs from it is
    embedded. Every operation is correctly rounded, so the page's script finds the same code.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        s = SIZE.numbers(b) / SIZE.numbers(a)
        d = DISTANCE.numbers(cosine)
        return DISTANCE.codes(np.sqrt((1 - s) * (1 - s) + 2 * s * d))


def packed(data: bytes) -> str:
    """Compressed, in base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of unsigned integers as one block: `arrays` (name, length, bytes per number) and `gz`."""
    planes = []
    for array in arrays.values():
        little = np.ascontiguousarray(array.ravel(), dtype=array.dtype.newbyteorder("<"))
        planes.append(little.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes())
    layout = [[name, int(array.size), array.dtype.itemsize] for name, array in arrays.items()]
    return {"arrays": layout, "gz": packed(b"".join(planes))}


def unpack(block: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `pack` was given, flat."""
    data, found, start = gzip.decompress(base64.b64decode(block["gz"])), {}, 0
    for name, length, size in block["arrays"]:
        planes = np.frombuffer(data, np.uint8, length * size, start).reshape(size, length)
        found[name] = np.ascontiguousarray(planes.T).view(f"<u{size}").ravel()
        start += length * size
    return found
