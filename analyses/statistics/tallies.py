"""Counts per question, and the shares and medians with intervals that come from them.

Pure functions on columns of equal length: `question`, `shifted` (bool) and what they are grouped by.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.resampling import (
    RESAMPLES,
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    histogram_quantile,
    ratio,
    simultaneous_shares,
)

LOG_RATIO_EDGES = np.linspace(-np.log(64), np.log(64), 2001)
"""Bins for medians of norm ratios: 0.4% wide, from 1/64 to 64."""


def share(question: np.ndarray, shifted: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Share of pairs that are shifted, resampling questions."""
    codes, names = pd.factorize(question)
    sums = np.stack(
        [np.bincount(codes, weights, len(names)) for weights in (shifted, np.ones(len(codes)))], 1
    )
    return cluster_bootstrap(sums, ratio, resamples, seed=seed)


def per_pair(
    rows: pd.DataFrame,
    overlaps: np.ndarray,
    threshold: float,
    paper: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """A row per (a, b) of one comparison: pairs, questions, shifted shares at both thresholds, medians, and
    the share of pairs that are bit-identical.
    """
    columns = ["a", "b", "questions", "pairs", "shifted", "low", "high"]
    columns += [f"{c} at {paper}" for c in ("shifted", "low", "high")]
    columns += ["median overlap", "lowest overlap", "identical"]
    records = []
    question, a, b = (rows[c].to_numpy() for c in ("question", "a", "b"))
    there = np.isfinite(overlaps)
    identical = rows["relative_l2"].to_numpy() == 0
    for one, other in pairs_there(a[there], b[there]):
        here = there & (a == one) & (b == other)
        values, of = overlaps[here], question[here]
        own = share(of, values < threshold, resamples, seed)
        theirs = share(of, values < paper, resamples, seed)
        records.append(
            (
                *(one, other, own.n_questions, len(values), own.estimate, own.low, own.high),
                *(theirs.estimate, theirs.low, theirs.high, np.median(values), values.min()),
                identical[here].mean(),
            )
        )
    return pd.DataFrame(records, columns=columns)


def pairs_there(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (a, b) that occur, in order."""
    codes = np.unique(256 * a.astype(np.int16) + b)
    return [(int(code) // 256, int(code) % 256) for code in codes]


def counts_by(
    group: np.ndarray, question: np.ndarray, shifted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shifted pairs and all pairs, [question, group, 2], with the groups and the questions they are of."""
    codes, names = pd.factorize(question, sort=True)
    groups, values = pd.factorize(group, sort=True)
    n, k = len(names), len(values)
    flat = codes * k + groups
    counts = [np.bincount(flat, w, n * k).reshape(n, k) for w in (shifted, np.ones(len(flat)))]
    return np.stack(counts, axis=-1), values, names


def by(
    name: str,
    group: np.ndarray,
    question: np.ndarray,
    shifted: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Shift rate per position or layer, with question-level intervals.

    Returns:
        Columns `name`, share, low, high, pairs, questions (that have such pairs), questions_shifted (the
        share of those with at least one shift there), band_low, band_high (`simultaneous_shares`: holds for
        all positions or layers at once).
    """
    counts, values, _ = counts_by(group, question, shifted)
    estimate, low, high = bootstrap_ends(counts, ratio, resamples, seed=seed)
    _, band_low, band_high = simultaneous_shares(counts, resamples, seed=seed)
    questions = (counts[..., 1] > 0).sum(axis=0)
    return pd.DataFrame(
        {
            name: values,
            "share": estimate,
            "low": low,
            "high": high,
            "pairs": counts[..., 1].sum(axis=0).astype(int),
            "questions": questions,
            "questions_shifted": (counts[..., 0] > 0).sum(axis=0) / questions,
            "band_low": band_low,
            "band_high": band_high,
        }
    )


def rate_matrix(position: np.ndarray, layer: np.ndarray, shifted: np.ndarray) -> pd.DataFrame:
    """Shift rate over questions, positions down, layers across; NaN where there is no pair."""
    rows, positions = pd.factorize(position, sort=True)
    columns, layers = pd.factorize(layer, sort=True)
    shape = len(positions), len(layers)
    flat = rows * shape[1] + columns
    top, bottom = (np.bincount(flat, w, shape[0] * shape[1]) for w in (shifted, np.ones(len(flat))))
    rates = ratio(np.stack([top, bottom], axis=-1)).reshape(shape)
    return pd.DataFrame(
        rates, index=pd.Index(positions, name="position"), columns=pd.Index(layers, name="layer")
    )


def median_ratio(
    question: np.ndarray, ratios: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Median of positive ratios over pairs; the interval's ends are read off histograms 0.4% wide."""
    usable = np.isfinite(ratios) & (ratios > 0)
    codes, names = pd.factorize(question[usable])
    logs = np.log(ratios[usable])
    bins = len(LOG_RATIO_EDGES) - 1
    index = np.clip(np.searchsorted(LOG_RATIO_EDGES, logs, side="right") - 1, 0, bins - 1)
    counts = np.bincount(codes * bins + index, minlength=len(names) * bins).reshape(len(names), bins)

    def median(totals: np.ndarray) -> np.ndarray:
        return np.exp(histogram_quantile(totals, LOG_RATIO_EDGES, 0.5))

    found = cluster_bootstrap(counts, median, resamples, seed=seed)
    if not len(logs):
        return found
    exact = float(np.exp(np.median(logs)))
    low, high = min(found.low, exact), max(found.high, exact)  # NaN ends stay NaN
    return Interval(exact, low, high, found.n_questions, found.level, found.reason)


def eta_squared(group: np.ndarray, shifted: np.ndarray) -> float:
    """Share of the variance of `shifted` that lies between the groups; NaN if nothing varies."""
    codes, names = pd.factorize(group)
    total = np.var(shifted)
    if not total:
        return float("nan")
    counts = np.bincount(codes, minlength=len(names))
    rates = np.bincount(codes, shifted, len(names)) / counts
    return float(np.average((rates - shifted.mean()) ** 2, weights=counts) / total)
