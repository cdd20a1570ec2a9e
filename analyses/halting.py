"""The halting probe (claim C12): can it be told from position 0 whether thinking longer helps or breaks?

Every number is out of fold, with layer, dimensions and penalty chosen inside each fold; every p-value
permutes the labels through all of it. Beside the probe stand what a sceptic asks for: the two policies that
need no probe, plain probes, what selection outside the fold would have shown, and how well random labels
can be memorised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from sst_interp.analyses.basin_shifts import UNKNOWN
from sst_interp.analyses.figures import halting as halting_figures
from sst_interp.analyses.parts.answers import answers_of
from sst_interp.analyses.parts.dims_read import DimsRead, dims_read
from sst_interp.analyses.parts.halting_words import verdict
from sst_interp.analyses.parts.plain_probes import comparison
from sst_interp.analyses.parts.probe_scores import (
    auc,
    auc_difference,
    brier,
    calibration,
    decisions,
    pairs_in_order,
    probabilities,
)
from sst_interp.analyses.parts.probe_validation import (
    Progress,
    at_chance,
    in_folds,
    null_scores,
    pair_auc,
    per_question,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.along_texts import p_value
from sst_interp.analyses.statistics.binomial_readings import Hits, binomial_readings
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval
from sst_interp.errors import SSTError
from sst_interp.probe.design import Design
from sst_interp.probe.features import Features, position0, usable_layers
from sst_interp.probe.fitting import Inputs
from sst_interp.probe.labels import Labels, halting_labels
from sst_interp.probe.validation import score

if TYPE_CHECKING:
    from sst_interp.run import Run

PERMUTATIONS = 1000
REPEATS = 10


@dataclass(frozen=True, eq=False)
class Halting(Result):
    """What the probe tells, and what it is worth. Intervals resample questions, with the probes as they
    are.
    """

    label: str = ""
    definition: str = ""
    """Which questions are positive, and which negative."""
    action: str = "halt"
    """What is done with a question called positive: `halt` or `iterate`."""
    kind: str = ""
    """Of probe."""
    iteration: int = 1
    """After which iteration of position 0 the states were read."""
    n_questions: int = 0
    n_positive: int = 0
    n_excluded: int = 0
    """Questions that are neither positive nor negative, or lack a depth."""
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per question: question, id, positive, score (out of fold; above 0: called positive), probability,
    called, and the layer, dims and penalty that were chosen without it."""
    auc: Interval = UNKNOWN
    """Leave-one-out, rebalanced: the headline. This and the next three are the same probe."""
    pair_auc: Interval = UNKNOWN
    """Leave-pair-out."""
    fold_auc: Interval = UNKNOWN
    """Repeated stratified k-fold, pairs of one fold."""
    pooled_auc: Interval = UNKNOWN
    """Leave-one-out without rebalancing, pooled over questions: biased, for comparison with the
    literature."""
    sensitivity: Interval = UNKNOWN
    specificity: Interval = UNKNOWN
    balanced: Interval = UNKNOWN
    hits: int = 0
    """Positive questions called positive, of n_positive."""
    called: int = 0
    """Questions called positive, of n_questions."""
    brier: Interval = UNKNOWN
    base_brier: float = math.nan
    """Of predicting the share of positive questions for every one."""
    calibration: pd.DataFrame = field(default_factory=pd.DataFrame)
    permutations: int = 0
    p_auc: float = math.nan
    """Permutation p-value of the leave-one-out AUC; this and the next three are one-sided."""
    p_fold_auc: float = math.nan
    """Of the AUC of the first division into folds."""
    p_balanced: float = math.nan
    p_hits: float = math.nan
    null: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per permutation: auc, fold_auc, balanced, hits, called, fitted."""
    readings: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Hits as a binomial figure against every rate, the paper's too (`binomial_readings`)."""
    fitted: float = math.nan
    """Balanced accuracy on the questions learnt from, mean over folds ..."""
    fitted_random: float = math.nan
    """... and with permuted labels: what the probe can memorise. The difference is its selectivity."""
    leaky_auc: Interval = UNKNOWN
    """Leave-one-out AUC with the selection made on all questions, the held-out one included."""
    leak: Interval = UNKNOWN
    """What that adds."""
    dims: DimsRead | None = None
    """Dimensions read by the leave-one-out probes."""
    fold_dims: DimsRead | None = None
    """By those of the folds, which share fewer questions: their agreement means more."""
    comparison: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per probe and policy (`plain_probes.comparison`)."""
    at_chance: str | None = None
    """Why the labels are noise (they are about right and wrong, and the model guesses); None if they are
    not."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return f"Halting probe: {self.label}" if self.label else "Halting probe"

    @property
    def table(self) -> pd.DataFrame:
        """A row per probe and policy."""
        return self.comparison

    @property
    def selectivity(self) -> float:
        """How much better it fits the real labels than random ones, in balanced accuracy where it learns."""
        return self.fitted - self.fitted_random

    @property
    def verdict(self) -> str:
        """AUC with its p-value, both sides of the decision, the binomial figure, leak and alternatives."""
        return f"not testable: {self.not_testable}." if self.not_testable else verdict(self)

    def figure(self) -> go.Figure:
        """AUC of the probe and the alternatives."""
        return self.figures()["auc"]

    def figures(self) -> dict[str, go.Figure]:
        """auc, decisions, permutation, calibration and dims."""
        return halting_figures.figures_of(self)


def halting(
    run: Run,
    label: str = "must-halt",
    layer: int | None = None,
    design: Design | None = None,
    iteration: int = 1,
    permutations: int = PERMUTATIONS,
    repeats: int = REPEATS,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
    strict: bool = True,
) -> Halting:
    """The halting probe of a captured run.

    Args:
        run: captured with `keep = "position0"` (the default) or more.
        label: what is to be told (`probe.labels.RULES`).
        layer: which layer's output is read; None chooses among all of them, inside each fold.
        design: the kind of probe and its candidates; its `layers` are set by `layer`.
        iteration: after which iteration of position 0.
        permutations: B; 0 tests nothing.
        repeats: divisions into folds.
        resamples: question resamples.
        progress: called with (what, done, of).
        strict: raise SSTError for a run the question cannot be asked of; otherwise the result says why not.

    Raises:
        SSTError: labels all equal, a class of fewer than two questions, a layer or states that were not
            captured, constant features.
    """
    try:
        if not len(run.questions):
            raise SSTError("the table questions of this run is empty", "capture the run first")
        answers = answers_of(run.questions)
        labels = halting_labels(answers, label)
        features = position0(run, labels.questions, iteration)
        found = halting_of(features, labels, layer, design, permutations, repeats, resamples, progress)
        return replace(found, at_chance=at_chance(answers, label, resamples))
    except SSTError as error:
        if strict:
            raise
        return Halting(label=label, not_testable=error.message)


def halting_of(
    features: Features,
    labels: Labels,
    layer: int | None = None,
    design: Design | None = None,
    permutations: int = PERMUTATIONS,
    repeats: int = REPEATS,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
) -> Halting:
    """The same from features and labels in memory; arguments as for `halting`."""
    design = replace(design or Design(), layers=usable_layers(features, layer))
    inputs, positive = Inputs(features.states), labels.positive
    y = torch.from_numpy(positive[None].astype(np.float32))
    options = resamples, design.seed
    every = ("leave_one_out", "plain_leave_one_out", "folds")
    own = score(design, inputs, y, every, keep=True)
    loo, logits = own["leave_one_out"], own["leave_one_out"].logits[0]
    told, in_order = logits > 0, pairs_in_order(logits, positive)
    leaky = score(replace(design, leak=True), inputs, y)["leave_one_out"].logits[0]
    leaky_pairs = pairs_in_order(leaky, positive)
    first, folded = in_folds(own["folds"], design, inputs, y, repeats)
    found = decisions(positive, told, *options)
    chance = probabilities(logits, positive)

    null = null_scores(design, inputs, positive, permutations, progress)
    hits, called = int((positive & told).sum()), int(told.sum())
    observed = {"auc": in_order.share, "fold_auc": first, "balanced": found.balanced.estimate, "hits": hits}
    p = {name: p_value(null[name].to_numpy(), value, 1) if len(null) else math.nan
         for name, value in observed.items()}  # fmt: skip
    permuted = {f"labels permuted {permutations:,} times": p["hits"]} if permutations else {}
    width, action = (inputs.d_model, len(design.layers)), "halt" if labels.halts else "iterate"
    result = Halting(
        label=labels.name,
        definition=labels.definition,
        action=action,
        kind=design.kind,
        iteration=features.iteration,
        n_questions=len(positive),
        n_positive=labels.n_positive,
        n_excluded=labels.n_excluded,
        scores=per_question(labels, loo, told, chance),
        auc=auc(in_order, *options),
        pair_auc=pair_auc(design, inputs, y, resamples),
        fold_auc=auc(folded, *options),
        pooled_auc=auc(pairs_in_order(own["plain_leave_one_out"].logits[0], positive), *options),
        sensitivity=found.sensitivity,
        specificity=found.specificity,
        balanced=found.balanced,
        hits=hits,
        called=called,
        brier=brier(chance, positive, *options),
        base_brier=labels.n_positive * labels.n_negative / len(positive) ** 2,
        calibration=calibration(chance, positive, resamples=resamples, seed=design.seed),
        permutations=permutations,
        p_auc=p["auc"],
        p_fold_auc=p["fold_auc"],
        p_balanced=p["balanced"],
        p_hits=p["hits"],
        null=null,
        readings=binomial_readings(
            Hits(hits, labels.n_positive), called, len(positive), permuted, action=action
        ),
        fitted=float(loo.fitted.mean()),
        fitted_random=float(null["fitted"].mean()) if len(null) else math.nan,
        leaky_auc=auc(leaky_pairs, *options),
        leak=auc_difference(leaky_pairs, in_order, *options),
        dims=dims_read(loo.read, loo.layer[0], *width),
        fold_dims=dims_read(own["folds"].read, own["folds"].layer[0], *width),
    )
    return replace(result, comparison=comparison(result, features, positive, in_order, design, resamples))
