"""The plain alternatives to a two-layer probe, on one footing with it (claim C12).

If prompt length tells as much, no state was needed; if a linear probe does, no second layer; if a random
layer does, no choice of layer. All are scored in the same leave-one-out, with their own penalty (and layer,
where one is chosen) chosen inside each fold, and compared with the probe on the same resampled questions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from sst_interp.analyses.statistics.bootstrap import Interval, as_columns
from sst_interp.experiments.probe.data import SCALARS, Features, Labels
from sst_interp.experiments.probe.fit import Design, Inputs
from sst_interp.experiments.probe.scores import (
    Decisions,
    Pairs,
    auc,
    auc_difference,
    brier,
    decisions,
    pairs_in_order,
    probabilities,
)
from sst_interp.experiments.probe.validate import score

NAMES = {"two_layer": "two-layer probe", "l2": "logistic regression, L2", "l1": "logistic regression, L1"}


def constants(action: str) -> tuple[str, str]:
    """Names of the two policies that need no probe: `always-halt` and `never-halt`."""
    return f"always-{action}", f"never-{action}"


class Plain(NamedTuple):
    """One alternative: what it reads, and with what."""

    name: str
    inputs: Inputs
    design: Design


def plain_probes(features: Features, design: Design) -> list[Plain]:
    """The alternatives there are: those whose inputs vary."""
    states, layers = Inputs(features.states), design.layers
    linear = replace(design, kind="l2", penalties=(), steps=0)
    usable = [x for x in range(states.n_layers) if x not in features.constant]
    drawn = int(np.random.default_rng([design.seed, 3]).choice(usable))
    plain = [
        Plain(NAMES[kind], states, replace(linear, kind=kind, layers=layers))
        for kind in ("l2", "l1")
        if kind != design.kind
    ]
    plain.append(Plain(f"L2, random layer ({drawn})", states, replace(linear, layers=(drawn,))))
    if 0 in usable:
        plain.append(Plain("L2, layer 0", states, replace(linear, layers=(0,))))
    scalars = features.scalars
    there = [
        i for i in range(len(SCALARS))
        if bool(torch.isfinite(scalars[:, i]).all()) and float(scalars[:, i].std()) > 0
    ]  # fmt: skip
    for i in there:
        plain.append(Plain(SCALARS[i], Inputs(scalars[:, None, [i]]), replace(linear, layers=(0,))))
    if len(there) > 1:
        plain.append(Plain("these together", Inputs(scalars[:, None, there]), replace(linear, layers=(0,))))
    return plain


def comparison(
    features: Features,
    scores: pd.DataFrame,
    pairs: Pairs,
    labels: Labels,
    design: Design,
    resamples: int,
    p: float,
) -> pd.DataFrame:
    """The probe, the alternatives, always and never.

    Args:
        features: what there is to read.
        scores: of the probe, a row per question: score, probability.
        pairs: the probe's.
        labels: what is told.
        design: the probe's.
        resamples: question resamples.
        p: the probe's permutation p-value.

    Returns:
        A row each: name, auc, sensitivity, specificity, balanced, brier (each with `_low` and `_high`),
        called (share of questions), `probe_minus` (the probe's AUC minus this one's, with both ends) and p
        (permutation; the probe's only).
    """
    positive, rows, options = labels.positive, [], (resamples, design.seed)
    n, y = len(positive), torch.from_numpy(labels.positive[None].astype(np.float32))

    def add(name: str, area: Interval, said: Decisions, off: Interval, minus: Interval, p: float) -> None:
        row = {"name": name} | as_columns(auc=area, sensitivity=said.sensitivity)
        row |= as_columns(specificity=said.specificity, balanced=said.balanced, brier=off)
        rows.append(row | {"called": said.called} | as_columns(probe_minus=minus) | {"p": p})

    def add_scored(name: str, own: np.ndarray, theirs: Pairs, minus: Interval, p: float = math.nan) -> None:
        off = brier(probabilities(own, positive), positive, *options)
        add(name, auc(theirs, *options), decisions(positive, own > 0, *options), off, minus, p)

    nothing = Interval(math.nan, math.nan, math.nan, n)
    add_scored(NAMES[design.kind], scores["score"].to_numpy(), pairs, nothing, p)
    for plain in plain_probes(features, design):
        own = score(plain.design, plain.inputs, y)["leave_one_out"].logits[0]
        theirs = pairs_in_order(own, positive)
        add_scored(plain.name, own, theirs, auc_difference(pairs, theirs, *options))
    for name, call in zip(constants("halt" if labels.halts else "iterate"), (1.0, 0.0), strict=True):
        constant = np.full(n, call)
        even = pairs_in_order(constant, positive)
        said = Decisions(_exactly(call, n), _exactly(1 - call, n), _exactly(0.5, n), call)
        off, minus = brier(constant, positive, *options), auc_difference(pairs, even, *options)
        add(name, _exactly(0.5, n), said, off, minus, math.nan)
    return pd.DataFrame(rows)


def _exactly(value: float, n: int) -> Interval:
    """A number that no sample of questions could change."""
    return Interval(value, value, value, n)
