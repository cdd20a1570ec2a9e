"""At every position and step of thinking: has the state shifted, and is the most likely token another?"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.overlap import overlap_of, select
from sst_interp.analyses.parts.positions import position_overlaps
from sst_interp.analyses.statistics import bootstrap as tallies
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, cluster_bootstrap, ratio
from sst_interp.errors import SSTError


class StateAndArgmax(NamedTuple):
    """Positions of one comparison, sorted. A step is an iteration or depth compared with the first."""

    question: np.ndarray
    """[position]"""
    position: np.ndarray
    """[position]"""
    steps: tuple[int, ...]
    shifted: np.ndarray
    """[position, step]: the overlap of some layer is below the threshold."""
    changed: np.ndarray
    """[position, step]: the most likely token is not that of the first iteration or depth."""
    lowest_layer: np.ndarray
    """[position]: the lowest layer that has shifted at the last step; -1: none has."""
    n_excluded: int
    """Positions left out: an overlap is NaN, or there is no row for some step."""


def state_and_argmax(
    pairs: pd.DataFrame, outputs: pd.DataFrame, comparison: str, threshold: float, kind: str = "cosine"
) -> StateAndArgmax:
    """Shifts and changes of the argmax of one comparison, from the pairs (1, b) for every b.

    Args:
        pairs: the run's `pairs` table.
        outputs: its `outputs` table.
        comparison: "replayed", "within" or "free".
        threshold: overlap below which a (position, layer) pair has shifted.
        kind: which overlap.

    Raises:
        SSTError: if either table has no such pairs.
    """
    here = (outputs["comparison"] == comparison).to_numpy(dtype=bool) & (outputs["a"] == 1).to_numpy(
        dtype=bool
    )
    rows = outputs[here]
    if not len(rows):
        raise SSTError(f"no outputs of comparison {comparison!r} in this run", "capture at least two depths")
    ours = (pairs["comparison"] == comparison).to_numpy(dtype=bool) & (pairs["a"] == 1).to_numpy(dtype=bool)
    pairs = pairs[ours]
    steps = tuple(int(b) for b in np.unique(rows["b"].to_numpy()))
    states, tokens = [], []
    for step in steps:
        found = position_overlaps(pairs, comparison, 1, step, threshold, kind)
        known = np.isfinite(found["lowest"].to_numpy())
        states.append((_key(found), known, found["shifted"].to_numpy() > 0))
        of_step = rows[(rows["b"] == step).to_numpy(dtype=bool)]
        order = np.argsort(_key(of_step), kind="stable")
        tokens.append((_key(of_step)[order], of_step["argmax_changed"].to_numpy(dtype=bool)[order]))
    ever = reduce(np.union1d, [keys for keys, *_ in (*states, *tokens)])
    both = [keys[known] for keys, known, _ in states] + [keys for keys, _ in tokens]
    whole = reduce(np.intersect1d, both)
    shifted = [of[np.searchsorted(keys, whole)] for keys, _, of in states]
    changed = [of[np.searchsorted(keys, whole)] for keys, of in tokens]
    return StateAndArgmax(
        whole >> 32,
        whole & 0xFFFFFFFF,
        steps,
        np.stack(shifted, axis=1),
        np.stack(changed, axis=1),
        _lowest_layer(pairs, comparison, steps[-1], threshold, kind, whole),
        len(ever) - len(whole),
    )


def changed_by_state(
    rows: StateAndArgmax, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[pd.DataFrame, Interval]:
    """How often the argmax has changed at a step, given the state there.

    Returns:
        Columns step, where (shifted, stable), positions, questions, changed, low, high; and, at the last
        step, the share at shifted minus the share at stable positions.
    """
    records = []
    for k, step in enumerate(rows.steps):
        for where, here in (("shifted", rows.shifted[:, k]), ("stable", ~rows.shifted[:, k])):
            found = tallies.share(rows.question[here], rows.changed[here, k], resamples, seed)
            ends = found.estimate, found.low, found.high
            records.append((step, where, int(here.sum()), found.n_questions, *ends))
    columns = ["step", "where", "positions", "questions", "changed", "low", "high"]
    codes, names = pd.factorize(rows.question)
    shifted, changed = rows.shifted[:, -1], rows.changed[:, -1]
    cells = [
        np.bincount(codes, weights, len(names))
        for where in (shifted, ~shifted)
        for weights in (where & changed, where)
    ]

    def gap(totals: np.ndarray) -> np.ndarray:
        shares = ratio(totals.reshape(-1, 2, 2))
        return shares[:, 0] - shares[:, 1]

    difference = cluster_bootstrap(np.stack(cells, axis=1), gap, resamples, seed=seed)
    return pd.DataFrame(records, columns=columns), difference


def _lowest_layer(
    pairs: pd.DataFrame, comparison: str, b: int, threshold: float, kind: str, whole: np.ndarray
) -> np.ndarray:
    rows, _, _ = select(pairs, comparison, 1, b)
    below = overlap_of(rows, kind) < threshold
    keys, layer = _key(rows)[below], rows["layer"].to_numpy()[below]
    keep = np.isin(keys, whole)
    order = np.argsort(-layer[keep], kind="stable")
    lowest = np.full(len(whole), -1)
    lowest[np.searchsorted(whole, keys[keep][order])] = layer[keep][
        order
    ]  # the last one written is the lowest
    return lowest


def _key(rows: pd.DataFrame) -> np.ndarray:
    """Question and position in one int64, in the order of both."""
    return (rows["question"].to_numpy(dtype=np.int64) << 32) | rows["position"].to_numpy(dtype=np.int64)
