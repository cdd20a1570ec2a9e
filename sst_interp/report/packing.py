"""Numbers made small enough to embed: rounded to significant digits, as codes, compressed, as base64.

A code stands for one decimal number of two or three significant digits, so that the page shows the table's
number at a stated rounding and not an approximation to it. Every browser since 2023 can undo gzip by itself
(`DecompressionStream`); bytes of one significance are kept together, which gzip likes.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

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
