"""The distributions of overlap that one comparison has: all pairs pooled, each pair of depths, each layer.

`collect` counts them, per question and bin, in one pass over the rows; `measure` gives a row of numbers to
each, from `modes`, `mixture` and `dip`. What they mean is in `bimodality`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, cluster_bootstrap, pairs_there
from sst_interp.analyses.statistics.dip import dip_test
from sst_interp.analyses.statistics.mixture import MixtureFit, fit_mixtures
from sst_interp.analyses.statistics.modes import BINS, find_modes, grid, question_histograms
from sst_interp.analyses.statistics.permutation import benjamini_hochberg

COLUMNS = [
    *("scope", "a", "b", "layer", "pairs", "questions"),
    *("modes", "antimode", "depth", "depth_low", "depth_high", "missing", "p", "p_layers"),
    *("identical", "at_one"),
    *("components", "gain", "gain_low", "gain_high", "centre_1", "centre_2", "weight_2", "fit_depth"),
    *("components_angle", "dip", "dip_p", "dip_p_questions"),
]


class Scope(NamedTuple):
    """One distribution; `a`, `b` and `layer` are None where they are pooled over."""

    name: str
    """"pooled", "pair" or "layer"."""
    a: int | None
    b: int | None
    layer: int | None
    histograms: np.ndarray
    """Pairs per question and bin, [question, BINS]; the same questions in every scope."""
    identical: float
    """Share of bit-identical pairs."""


def collect(
    rows: pd.DataFrame,
    overlap: np.ndarray,
    resolution: float,
    headline: tuple[int, int],
    every_pair: bool = False,
) -> list[Scope]:
    """Pooled first, then every pair, each followed by its layers where they are wanted.

    Args:
        rows: of one comparison, all with an overlap.
        overlap: [row].
        resolution: r of `modes.grid`.
        headline: the pair whose layers are wanted.
        every_pair: layers of every pair.
    """
    question, questions = pd.factorize(rows["question"].to_numpy(), sort=True)
    layer, layers = pd.factorize(rows["layer"].to_numpy(), sort=True)
    same = rows["relative_l2"].to_numpy() == 0
    a, b = rows["a"].to_numpy(), rows["b"].to_numpy()
    n, k = len(questions), len(layers)
    found: list[Scope] = []
    for pair in pairs_there(a, b):
        here = (a == pair[0]) & (b == pair[1])
        if not every_pair and pair != headline:
            own = question_histograms(question[here], overlap[here], resolution, n)
            found.append(Scope("pair", *pair, None, own, float(same[here].mean())))
            continue
        code = layer[here].astype(np.int64) * n + question[here]
        cube = question_histograms(code, overlap[here], resolution, k * n).reshape(k, n, BINS)
        found.append(Scope("pair", *pair, None, cube.sum(axis=0), float(same[here].mean())))
        total = np.bincount(layer[here], minlength=k)
        alike = np.bincount(layer[here], same[here], k)
        found += [
            Scope("layer", *pair, int(layers[i]), cube[i], float(alike[i] / total[i]))
            for i in np.flatnonzero(total)
        ]
    pooled = np.sum([scope.histograms for scope in found if scope.name == "pair"], axis=0)
    return [Scope("pooled", None, None, None, pooled, float(same.mean())), *found]


def measure(
    scopes: list[Scope], resolution: float, angle: bool, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[pd.DataFrame, str | None]:
    """A row of numbers per scope, and why the dip test was not made (None if it was, anywhere).

    Args:
        scopes: from `collect`.
        resolution: r.
        angle: fit mixtures of pooled layers in arccos(overlap) as well.
        resamples: question resamples.
        seed: of the resampling.
    """
    cube = np.stack([scope.histograms for scope in scopes])
    fits = fit_mixtures(cube, resolution, "log", resamples, seed)
    angles: list[MixtureFit | None] = [None] * len(scopes)
    for i in [i for i, scope in enumerate(scopes) if angle and scope.name != "layer"]:
        angles[i] = fit_mixtures(cube[[i]], resolution, "angle", resamples, seed)[0]
    records, reasons = [], []
    for scope, fit, other in zip(scopes, fits, angles, strict=True):
        histograms = scope.histograms[scope.histograms.sum(axis=1) > 0]
        modes = find_modes(histograms, resolution, resamples=resamples, seed=seed)
        dip = dip_test(histograms, resolution, seed)
        reasons.append(dip.reason)
        depth = modes.depth_interval
        records.append(
            {
                "scope": scope.name,
                "a": _number(scope.a),
                "b": _number(scope.b),
                "layer": _number(scope.layer),
                "pairs": int(histograms.sum()),
                "questions": len(histograms),
                "modes": modes.count,
                "antimode": modes.antimode.estimate if modes.antimode else math.nan,
                "depth": modes.depth,
                "depth_low": depth.low if depth else math.nan,
                "depth_high": depth.high if depth else math.nan,
                "missing": modes.missing,
                "p": modes.p_value,
                "p_layers": math.nan,
                "identical": scope.identical,
                "at_one": fit.at_one,
                "components": fit.components,
                "gain": fit.gain.estimate,
                "gain_low": fit.gain.low,
                "gain_high": fit.gain.high,
                "centre_1": fit.centres[0] if fit.centres else math.nan,
                "centre_2": fit.centres[1] if len(fit.centres) > 1 else math.nan,
                "weight_2": fit.weights[1] if len(fit.weights) > 1 else math.nan,
                "fit_depth": fit.depth,
                "components_angle": other.components if other else math.nan,
                "dip": dip.dip.estimate,
                "dip_p": dip.p_value,
                "dip_p_questions": dip.p_questions,
            }
        )
    table = pd.DataFrame(records, columns=COLUMNS)
    for _, of_pair in table[table["scope"] == "layer"].groupby(["a", "b"]):
        table.loc[of_pair.index, "p_layers"] = benjamini_hochberg(of_pair["p"].to_numpy())
    return table, None if None in reasons else reasons[0]


def _number(value: int | None) -> float:
    return math.nan if value is None else float(value)


def between_layers(
    scopes: list[Scope], pair: tuple[int, int], resolution: float, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Share of the variance of v = log(1 - overlap + r) that lies between the layers of a pair, 0 to 1."""
    cube = np.stack([s.histograms for s in scopes if s.name == "layer" and (s.a, s.b) == pair], axis=1)
    edges = grid(resolution)
    v = (edges[1:] + edges[:-1]) / 2
    sums = cube @ np.stack([np.ones_like(v), v, v**2], axis=-1)  # [question, layer, 3]

    def share(totals: np.ndarray) -> np.ndarray:
        count, first, second = np.moveaxis(totals, -1, 0)
        n = count.sum(axis=-1)
        mean = first.sum(axis=-1) / n
        whole = second.sum(axis=-1) / n - mean**2
        of_layers = np.divide(first**2, count, out=np.zeros_like(first), where=count > 0).sum(axis=-1)
        part = np.maximum(of_layers / n - mean**2, 0)
        return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 1e-9)

    there = cube.any(axis=(1, 2))
    return cluster_bootstrap(sums[there], share, resamples, seed=seed)
