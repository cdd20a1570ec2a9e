"""The plain alternatives to a two-layer probe, on one footing with it (claim C12).

If prompt length tells as much, no state was needed; if a linear probe does, no second layer; if a random
layer does, no choice of layer. All are scored in the same leave-one-out, with their own penalty (and layer,
where one is chosen) chosen inside each fold, and compared with the probe on the same resampled questions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from sst_interp.analyses.parts.probe_scores import (
    Decisions,
    Pairs,
    auc,
    auc_difference,
    brier,
    decisions,
    pairs_in_order,
    probabilities,
)
from sst_interp.analyses.statistics.bootstrap import Interval, as_columns
from sst_interp.probe.design import Design
from sst_interp.probe.features import SCALARS, Features
from sst_interp.probe.fitting import Inputs
from sst_interp.probe.validation import score

if TYPE_CHECKING:
    from sst_interp.analyses.halting import Halting

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
    found = [
        Plain(NAMES[kind], states, replace(linear, kind=kind, layers=layers))
        for kind in ("l2", "l1")
        if kind != design.kind
    ]
    found.append(Plain(f"L2, random layer ({drawn})", states, replace(linear, layers=(drawn,))))
    if 0 in usable:
        found.append(Plain("L2, layer 0", states, replace(linear, layers=(0,))))
    scalars = features.scalars
    there = [
        i for i in range(len(SCALARS))
        if bool(torch.isfinite(scalars[:, i]).all()) and float(scalars[:, i].std()) > 0
    ]  # fmt: skip
    for i in there:
        found.append(Plain(SCALARS[i], Inputs(scalars[:, None, [i]]), replace(linear, layers=(0,))))
    if len(there) > 1:
        found.append(Plain("these together", Inputs(scalars[:, None, there]), replace(linear, layers=(0,))))
    return found


def comparison(
    probe: Halting,
    features: Features,
    positive: np.ndarray,
    pairs: Pairs,
    design: Design,
    resamples: int,
) -> pd.DataFrame:
    """The probe, the alternatives, always and never.

    Args:
        probe: the result so far.
        features: what there is to read.
        positive: [question].
        pairs: the probe's.
        design: the probe's.
        resamples: question resamples.

    Returns:
        A row each: name, auc, sensitivity, specificity, balanced, brier (each with `_low` and `_high`),
        called (share of questions), `probe_minus` (the probe's AUC minus this one's, with both ends) and p
        (permutation; the probe's only).
    """
    y = torch.from_numpy(positive[None].astype(np.float32))
    options, rows = (resamples, design.seed), []

    def add(name: str, area: Interval, said: Decisions, off: Interval, minus: Interval, p: float) -> None:
        row = {"name": name} | as_columns(auc=area, sensitivity=said.sensitivity)
        row |= as_columns(specificity=said.specificity, balanced=said.balanced, brier=off)
        rows.append(row | {"called": said.called} | as_columns(probe_minus=minus) | {"p": p})

    nothing = Interval(math.nan, math.nan, math.nan, len(positive))
    told = probe.scores["called"].to_numpy(dtype=bool)
    add(NAMES[design.kind], probe.auc, decisions(positive, told, *options), probe.brier, nothing, probe.p_auc)
    for plain in plain_probes(features, design):
        scores = score(plain.design, plain.inputs, y)["leave_one_out"].logits[0]
        theirs, chance = pairs_in_order(scores, positive), probabilities(scores, positive)
        add(
            plain.name, auc(theirs, *options), decisions(positive, scores > 0, *options),
            brier(chance, positive, *options), auc_difference(pairs, theirs, *options), math.nan,
        )  # fmt: skip
    for name, call in zip(constants(probe.action), (1.0, 0.0), strict=True):
        constant = np.full(len(positive), call)
        even = pairs_in_order(constant, positive)
        found, let_go, half = (_exactly(v, len(positive)) for v in (call, 1 - call, 0.5))
        said = Decisions(found, let_go, half, call)
        off, minus = brier(constant, positive, *options), auc_difference(pairs, even, *options)
        add(name, _exactly(0.5, len(positive)), said, off, minus, math.nan)
    return pd.DataFrame(rows)


def _exactly(value: float, n: int) -> Interval:
    """A number that no sample of questions could change."""
    return Interval(value, value, value, n)
