"""Floats rounded to so many significant bits: what a measurement does not know only takes room."""

from __future__ import annotations

from typing import Any

import numpy as np

SIGNIFICANT_BITS = 12
"""Of every float in `noise` and `nudges`: within 1 part in 4,096."""


def significant(values: np.ndarray, bits: int = SIGNIFICANT_BITS) -> np.ndarray:
    """Values rounded to so many significant bits: 0, infinities and NaN stay what they are."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def rounded_floats(name: str, values: np.ndarray, bits: int = SIGNIFICANT_BITS) -> np.ndarray:
    """A column's floats as rounded float32; of a cosine, it is 1 - cosine that is rounded."""
    if name == "cosine":
        return (1 - significant(1 - values.astype(np.float64), bits)).astype(np.float32)
    return significant(values, bits).astype(np.float32)


def rounded_columns(columns: dict[str, Any], bits: int = SIGNIFICANT_BITS) -> dict[str, Any]:
    """The columns with their floats rounded; a list of arrays is a column of lists."""
    out = dict(columns)
    for name, values in columns.items():
        if isinstance(values, list):
            flat = rounded_floats(name, np.concatenate(values), bits)
            out[name] = np.split(flat, np.cumsum([len(v) for v in values])[:-1])
        elif values.dtype.kind == "f":
            out[name] = rounded_floats(name, values, bits)
    return out
