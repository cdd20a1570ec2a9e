"""The per-question heat maps, quantised to one byte a cell so that a whole run fits in one HTML file.

Overlap is stored on the axis of the histograms, v = log(1 - overlap + r): 254 steps of about 3% of the
distance from 1. Norm ratios are stored as log2 on [-3, 3]. 0 is "no pair here".
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.analyses.basin_shifts import BasinShifts
from sst_interp.analyses.modes import grid, to_v
from sst_interp.analyses.overlap import RESOLUTION, overlap_of, select
from sst_interp.report.escaping import visible

LARGEST_BYTES = 3_500_000
"""Cells embedded over all comparisons; beyond it the first questions are kept, and the report says so."""
LOG2_RATIO = 3.0


def quantise(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers on [low, high] as bytes 1 to 255, clipped; NaN as 0."""
    scaled = 1 + np.rint(254 * (np.clip(values, low, high) - low) / (high - low))
    return np.where(np.isfinite(values), scaled, 0).astype(np.uint8)


def maps_data(
    pairs: pd.DataFrame, results: list[BasinShifts], names: dict[int, str], largest: int = LARGEST_BYTES
) -> dict[str, Any]:
    """What the page's script draws the heat maps from, JSON-ready.

    Args:
        pairs: the run's `pairs` table.
        results: the testable comparisons.
        names: record id of every question.
        largest: bytes of cells to embed at most.

    Returns:
        `questions` (labels), `maps` (per comparison: label, threshold, size, positions, layers, base64 of
        the cells [question, layer, position], first differing position per question for `free`),
        `left_out` (how many questions were not embedded).
    """
    chosen = [(r, *_rows(pairs, r)) for r in results]
    questions = sorted({int(q) for _, rows, _ in chosen for q in rows["question"].unique()})
    sizes = [rows["position"].nunique() * rows["layer"].nunique() for _, rows, _ in chosen]
    kept = questions[: max(1, int(largest // max(1, 2 * sum(sizes))))]
    return {
        "questions": [f"{q}: {visible(names.get(q, 'no id'))}" for q in kept],
        "maps": [_map(result, rows, values, kept) for result, rows, values in chosen],
        "left_out": len(questions) - len(kept),
        "log2_ratio": LOG2_RATIO,
    }


def _rows(pairs: pd.DataFrame, result: BasinShifts) -> tuple[pd.DataFrame, np.ndarray]:
    rows, _, _ = select(pairs, result.comparison, result.a, result.b)
    return rows, overlap_of(rows, result.kind)


def _map(result: BasinShifts, rows: pd.DataFrame, overlap: np.ndarray, kept: list[int]) -> dict[str, Any]:
    inside = rows["question"].isin(kept).to_numpy(dtype=bool)
    rows, overlap = rows[inside], overlap[inside]
    position, positions = pd.factorize(rows["position"], sort=True)
    layer, layers = pd.factorize(rows["layer"], sort=True)
    question = np.searchsorted(kept, rows["question"].to_numpy())
    edges = grid(RESOLUTION[result.kind])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(rows["norm_b"].to_numpy(dtype=float) / rows["norm_a"].to_numpy(dtype=float))

    def cells(values: np.ndarray) -> str:
        cube = np.zeros((len(kept), len(layers), len(positions)), dtype=np.uint8)
        cube[question, layer, position] = values
        return base64.b64encode(cube.tobytes()).decode()

    # Not `to_v(NaN)`: a pair without an overlap is a cell without a colour.
    v = np.where(np.isfinite(overlap), to_v(np.nan_to_num(overlap), RESOLUTION[result.kind]), np.nan)
    return {
        "comparison": result.comparison,
        "label": result.words,
        "kind": result.kind,
        "threshold": result.threshold,
        "resolution": RESOLUTION[result.kind],
        "v": [float(edges[0]), float(edges[-1])],
        "positions": [int(p) for p in positions],
        "layers": [int(x) for x in layers],
        "overlap": cells(quantise(v, edges[0], edges[-1])),
        "norm_ratio": cells(quantise(ratio, -LOG2_RATIO, LOG2_RATIO)),
        "differs_from": _first_difference(rows, kept) if result.comparison == "free" else None,
    }


def _first_difference(rows: pd.DataFrame, kept: list[int]) -> list[int | None]:
    """First position at which the two texts differ, per question; None where they never do."""
    apart = rows[~rows["same_prefix"].to_numpy(dtype=bool)]
    first = apart.groupby("question")["position"].min()
    return [int(first.loc[q]) if q in first.index else None for q in kept]
