"""The halting probe in one paragraph, computed from its numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sst_interp.analyses.parts.plain_probes import constants
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.halting import Halting

LEVEL = 0.05


def verdict(found: Halting) -> str:
    """What the probe tells, both sides of its decisions, and what else would have told as much."""
    return " ".join((_headline(found), _sides(found), _binomial(found), _controls(found)))


def _headline(found: Halting) -> str:
    negative = found.n_questions - found.n_positive
    words = f"{found.definition}; {found.n_positive} of {questions_words(found.n_questions)} positive. "
    words += f"Out of fold, the probe's AUC is {found.auc.text()} (leave-one-out, rebalanced"
    if found.permutations:
        low, high = found.null["auc"].quantile([0.025, 0.975])
        words += f"; permutation p = {found.p_auc:.2g}, 95% of {found.permutations:,} permuted labellings "
        words += f"between {low:.2f} and {high:.2f}): "
        if found.p_auc <= LEVEL:
            words += "it tells the two apart."
        else:
            words += "no more than permuted labels give, so nothing is shown."
    else:
        words += "; no permutations, so not tested)."
    words += f" Leave-pair-out {_area(found.pair_auc)}, stratified folds {_area(found.fold_auc)}"
    if found.permutations:
        words += f" (p = {found.p_fold_auc:.2g})"
    words += f", pooled without rebalancing {_area(found.pooled_auc)}."
    if found.at_chance:
        words += f" {found.at_chance[0].upper()}{found.at_chance[1:]}: this label says little."
    if min(found.n_positive, negative) < 10:
        words += f" The smaller class has {questions_words(min(found.n_positive, negative))}: read with care."
    return words


def _sides(found: Halting) -> str:
    negative = found.n_questions - found.n_positive
    rejected = negative - (found.called - found.hits)
    words = f"It finds {found.hits} of {found.n_positive} positive questions (sensitivity "
    words += f"{found.sensitivity.text(percent=True)}) and lets {rejected} of {negative} others go "
    always, never = constants(found.action)
    words += f"(specificity {found.specificity.text(percent=True)}); {always} finds {found.n_positive} of "
    words += f"{found.n_positive} and lets 0 of {negative} go, {never} 0 and {negative}."
    return words


def _binomial(found: Halting) -> str:
    own = found.readings[found.readings["whose"] == "this run"].set_index("against")["p"]
    implied, half, exact = own.iloc[0], own.loc["one half"], own.filter(like="Fisher").iloc[0]
    words = f"As a binomial figure its hits have p = {implied:.2g} at the rate the paper's p implies, "
    words += f"{half:.2g} at one half and {exact:.2g} with as many calls on any questions"
    if found.permutations:
        words += f"; permuted labels give as many hits with p = {found.p_hits:.2g}"
    return words + "."


def _controls(found: Halting) -> str:
    words = f"Selection outside the fold would have shown {found.leaky_auc.text()} "
    words += f"({found.leak.estimate:+.2f}). Where it learns, its balanced accuracy is {found.fitted:.2f}"
    if math.isfinite(found.fitted_random):
        words += f", and {found.fitted_random:.2f} with random labels (selectivity {found.selectivity:+.2f})"
    words += f"; predicted probabilities have a Brier score of {found.brier.text()}, the base rate "
    words += f"{found.base_brier:.3g}."
    table = found.comparison
    plain = table.iloc[1:-2]
    if len(plain):
        best = plain.iloc[int(np.argmax(plain["auc"].to_numpy()))]
        words += f" The best plain alternative, {best['name']}, has {best['auc']:.2f}: the probe is "
        words += f"{best['probe_minus']:+.2f} [{best['probe_minus_low']:+.2f}, "
        words += f"{best['probe_minus_high']:+.2f}] from it."
    dims = found.dims
    if dims is not None:
        words += f" Probes read {dims.count:.0f} dimensions on average ({percent_text(dims.share)} of a "
        words += f"layer); {dims.core} are read by at least half of them."
    return words


def _area(interval: Interval) -> str:
    return f"{interval.estimate:.2f}" if math.isfinite(interval.estimate) else "none"
