"""Which dimensions the probes read (claim C12: 107 of 5,376): how many, where, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import kstest


class DimsRead(NamedTuple):
    """What the probes of one cross-validation read."""

    table: pd.DataFrame
    """A row per (layer, dimension) that is read at all: layer, dim, probes (how many read it), share."""
    count: float
    """Dimensions a probe reads, mean."""
    share: float
    """Of the dimensions of its layer."""
    layers: dict[int, int]
    """Layer -> probes that read it."""
    stability: float
    """Of the set that is read, corrected for chance: 1, always the same; 0, as random sets of that size would
    agree (Nogueira, Sechidis & Brown 2018). NaN for one probe, or if all dimensions are read."""
    spread: float
    """Largest distance of the dimensions' distribution over the index range from an even one, 0 to 1
    (Kolmogorov-Smirnov), each weighing as often as it is read."""
    core: int
    """Dimensions that at least half of the probes read."""
    core_p: float
    """P-value of those lying evenly over the index range; NaN if there are none."""


def dims_read(read: Sequence[np.ndarray], layers: np.ndarray, d_model: int, n_layers: int) -> DimsRead:
    """Summarise.

    Args:
        read: per probe, the dimensions it reads.
        layers: per probe, the layer [probe].
        d_model: width of a layer.
        n_layers: layers there were to choose from.
    """
    probes = len(read)
    dims = np.concatenate([np.asarray(r, dtype=int) for r in read]) if probes else np.zeros(0, int)
    of = np.repeat(np.asarray(layers, dtype=int), [len(r) for r in read])
    code, times = np.unique(of * d_model + dims, return_counts=True)
    table = pd.DataFrame(
        {"layer": code // d_model, "dim": code % d_model, "probes": times, "share": times / max(probes, 1)}
    )
    count = len(dims) / probes if probes else math.nan
    core = table.loc[table["share"] >= 0.5, "dim"].to_numpy()
    order = np.sort((dims + 0.5) / d_model)
    steps = np.arange(1, len(order) + 1) / max(len(order), 1)
    spread = np.abs(np.concatenate([steps - order, order - steps + 1 / max(len(order), 1)])).max(initial=0)
    values, counts = np.unique(np.asarray(layers, dtype=int), return_counts=True)
    return DimsRead(
        table,
        count,
        count / d_model,
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
        stability([len(r) for r in read], times, probes, d_model * n_layers),
        float(spread) if len(order) else math.nan,
        len(core),
        float(kstest((core + 0.5) / d_model, "uniform").pvalue) if len(core) else math.nan,
    )


def stability(sizes: Sequence[int], times: np.ndarray, probes: int, candidates: int) -> float:
    """Agreement of sets beyond chance: 1 - mean variance of "is read" over that of random sets of their size.

    Args:
        sizes: how many each set holds.
        times: how often each candidate that is in any set is in one.
        probes: sets.
        candidates: how many there are to choose from.
    """
    mean = float(np.mean(sizes)) / candidates if probes else math.nan
    if probes < 2 or not 0 < mean < 1:
        return math.nan
    share = np.asarray(times) / probes
    variance = (share * (1 - share)).sum() * probes / (probes - 1) / candidates
    return float(1 - variance / (mean * (1 - mean)))
