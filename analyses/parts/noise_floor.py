"""The empirical noise floor (claim C7): how large is a change that nobody asked for?

The run's `noise` table has the same tokens at the same depth, computed once more: in another batch shape
("batch") and in float32 ("fp32"). A change between depths is set against the change such noise makes to the
same states, in relative L2, as a ratio of medians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, grouped_medians

KINDS = {"batch": "another batch shape", "fp32": "float32"}
"""What was changed, in words."""

TINY = 1e-30
"""Stands for 0 where logarithms are taken: medians of logarithms are logarithms of medians."""


@dataclass(frozen=True, eq=False)
class Floor:
    """The change between depths over one kind of noise at one depth. Intervals resample questions."""

    kind: str
    """"batch" or "fp32"."""
    depth: int
    """Depth at which the noise was measured."""
    change: Interval
    """Median relative L2 between the depths, all layers, at the questions and positions of the noise."""
    noise: Interval
    """Median relative L2 of the noise."""
    ratio: Interval
    """change / noise, both from the same resample; no estimate where the median noise is 0."""
    deepest: Interval
    """The same ratio in the deepest layer."""
    identical: float
    """Share of the noise pairs that are bit-identical."""
    roundings: float
    """The noise itself in bf16 roundings (median over dimensions, then over pairs)."""
    n_pairs: int
    """Noise pairs."""
    by_layer: pd.DataFrame
    """Columns layer, questions, change, change_low, change_high, noise, noise_low, noise_high, ratio, low,
    high."""


def noise_floors(
    rows: pd.DataFrame, noise: pd.DataFrame | None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[tuple[Floor, ...], str | None]:
    """Every floor that was measured, and why there is none.

    Args:
        rows: `pairs` rows of one comparison and one pair of depths.
        noise: the run's `noise` table, or None. It was measured on depth 1's own text: for `replayed` the
            questions and positions of both tables are the same tokens, for other comparisons the same places.
        resamples: question resamples.
        seed: of the resampling.

    Returns:
        A `Floor` per kind and depth, and None, or () and the reason.
    """
    if noise is None or not len(noise):
        return (), "the run has no noise table"
    own, of_noise = _key(rows), _key(noise)
    kinds, depths = noise["kind"].astype(str).to_numpy(), noise["depth"].to_numpy()
    common = np.isin(of_noise, np.unique(own))
    found = []
    for kind, depth in sorted(set(zip(kinds[common].tolist(), depths[common].tolist(), strict=True))):
        here = common & (kinds == kind) & (depths == depth)
        there = np.isin(own, np.unique(of_noise[here]))
        floor = _floor(kind, depth, rows[there], noise[here], resamples, seed)
        if floor is not None:
            found.append(floor)
    return tuple(found), None if found else "no position has both a change and noise"


def highest(floors: tuple[Floor, ...], kind: str) -> Floor | None:
    """The floor of one kind at the depth where it is highest, the strictest; None if it was not measured."""
    of_kind = [f for f in floors if f.kind == kind]
    return max(of_kind, key=lambda f: f.noise.estimate) if of_kind else None


def _floor(
    kind: str, depth: int, rows: pd.DataFrame, noise: pd.DataFrame, resamples: int, seed: int
) -> Floor | None:
    question, layer, values = (
        np.concatenate([rows[c].to_numpy(), noise[c].to_numpy()]).astype(float)
        for c in ("question", "layer", "relative_l2")
    )
    measured = np.arange(len(values)) >= len(rows)
    finite = np.isfinite(values)
    if not (finite & measured).any() or not (finite & ~measured).any():
        return None
    logs = np.log(np.where(finite, np.maximum(values, TINY), np.nan))

    def against(use: np.ndarray) -> list[Interval]:
        groups = ~measured[use], measured[use]
        medians = grouped_medians(question[use], logs[use], groups, [(0, 1)], resamples, seed)
        return _back(*medians)

    layers = np.unique(layer[finite]).astype(int)
    records = []
    for one in layers:
        change, floor, ratio = against(np.flatnonzero(layer == one))
        ends = [v for i in (change, floor, ratio) for v in (i.estimate, i.low, i.high)]
        records.append((one, ratio.n_questions, *ends))
    names = [f"{n}{end}" for n in ("change", "noise") for end in ("", "_low", "_high")]
    table = pd.DataFrame(records, columns=["layer", "questions", *names, "ratio", "low", "high"])
    change, floor, ratio = against(np.arange(len(values)))
    deepest = against(np.flatnonzero(layer == layers[-1]))[2]
    of_noise = noise["relative_l2"].to_numpy()
    return Floor(
        kind,
        int(depth),
        change,
        floor,
        ratio,
        deepest,
        identical=float(np.mean(of_noise[np.isfinite(of_noise)] == 0)),
        roundings=float(np.nanmedian(noise["bf16_ratio"])) if "bf16_ratio" in noise else math.nan,
        n_pairs=int((finite & measured).sum()),
        by_layer=table,
    )


def _back(change: Interval, noise: Interval, gap: Interval) -> list[Interval]:
    """From logarithms: the median change, the median noise, and their ratio."""
    none = 2 * TINY
    out = []
    for one in (change, noise):
        ends = [math.exp(v) if math.isfinite(v) else v for v in (one.estimate, one.low, one.high)]
        estimate, low, high = (0.0 if v < none else v for v in ends)
        out.append(Interval(estimate, low, high, one.n_questions, one.level, one.reason))
    if not out[0].n_questions or not out[1].n_questions:
        return [*out, Interval(math.nan, math.nan, math.nan, 0, gap.level, "not measured in this layer")]
    if out[1].estimate == 0:
        reason = "the median noise is 0: at least half of it is bit-identical"
        return [*out, Interval(math.nan, math.nan, math.nan, gap.n_questions, gap.level, reason)]
    estimate, low, high = (math.exp(v) if math.isfinite(v) else v for v in (gap.estimate, gap.low, gap.high))
    if out[1].low == 0:
        reason = "in some resamples the median noise is 0"
        return [*out, Interval(estimate, math.nan, math.nan, gap.n_questions, gap.level, reason)]
    return [*out, Interval(estimate, low, high, gap.n_questions, gap.level, gap.reason)]


def _key(table: pd.DataFrame) -> np.ndarray:
    """Question and position in one int64."""
    return (table["question"].to_numpy(dtype=np.int64) << 32) | table["position"].to_numpy(dtype=np.int64)
