"""The probe validated in every way the finding reports: by pair, in folds, and with permuted labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sst_interp.analyses.parts.answers import Answers, mean_of
from sst_interp.analyses.parts.probe_scores import (
    Pairs,
    auc,
    aucs,
    balanced_accuracies,
    pairs_in_order,
    pairs_scored,
)
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, percent_text
from sst_interp.probe.design import Design
from sst_interp.probe.fitting import Inputs
from sst_interp.probe.labels import RULES, Labels
from sst_interp.probe.permutation import permutation_scores
from sst_interp.probe.selection import blocks_of, random_keys
from sst_interp.probe.validation import Scores, score

MOST_PAIRS = 30_000
"""Leave-pair-out trains a probe per pair: beyond this many it is left out."""
NULL = ("auc", "fold_auc", "balanced", "hits", "called", "fitted")
Progress = Callable[[str, int, int], Any]


def at_chance(answers: Answers, label: str, resamples: int = RESAMPLES) -> str | None:
    """Why a label tells noise from noise: it is about right and wrong, and the answers are guesses; or None.

    Guesses: lettered answers whose accuracy is above blind guessing (lower end of its interval) at no depth.
    """
    if RULES[label].needs_answers or not answers.choices or not len(answers.questions):
        return None
    guess = 1 / answers.choices
    accuracies = [mean_of(right, resamples=resamples) for right in answers.correct.T]
    if any(accuracy.known and accuracy.low > guess for accuracy in accuracies):
        return None
    return (
        f"accuracy is above blind guessing ({percent_text(guess)}) at no depth, so right and wrong are noise"
    )


def pair_auc(design: Design, inputs: Inputs, y: Float[Tensor, "row question"], resamples: int) -> Interval:
    """The leave-pair-out AUC of one labelling; none where there are more than `MOST_PAIRS` pairs."""
    positive = y[0].numpy() > 0.5
    n = int(positive.sum() * (~positive).sum())
    if n > MOST_PAIRS:
        reason = f"{n:,} pairs to leave out; at most {MOST_PAIRS:,} are"
        return Interval(math.nan, math.nan, math.nan, len(positive), reason=reason)
    scores = score(design, inputs, y, ("leave_pair_out",))["leave_pair_out"].logits[0]
    return auc(pairs_scored(scores, positive), resamples, design.seed)


def in_folds(
    own: Scores, design: Design, inputs: Inputs, y: Float[Tensor, "row question"], repeats: int
) -> tuple[float, Pairs]:
    """The AUC within folds: of the first division alone, and the pairs of all divisions."""
    positive = y[0].numpy() > 0.5
    higher = compared = np.zeros((len(positive), len(positive)))
    first = math.nan
    for repeat in range(max(repeats, 1)):
        found = own if repeat == 0 else score(design, inputs, y, ("folds",), repeat)["folds"]
        fold = blocks_of(y.numpy(), design.blocks, random_keys(len(positive), design.seed, repeat))[0]
        pairs = pairs_in_order(found.logits[0], positive, fold)
        first = pairs.share if repeat == 0 else first
        higher, compared = higher + pairs.higher, compared + pairs.compared
    return first, Pairs(higher, compared)


def null_scores(
    design: Design,
    inputs: Inputs,
    positive: np.ndarray,
    permutations: int,
    progress: Progress | None,
) -> pd.DataFrame:
    """What permuted labels score, a row per permutation."""
    if permutations < 1:
        return pd.DataFrame(columns=list(NULL), dtype=float)
    each = None if progress is None else lambda done: progress("permutations", done, permutations)
    labels, scored = permutation_scores(
        design, inputs, positive, permutations, seed=design.seed, progress=each
    )
    loo, folds = scored["leave_one_out"], scored["folds"]
    blocks = blocks_of(labels.astype(np.float32), design.blocks, random_keys(len(positive), design.seed))
    called = loo.logits > 0
    values = (
        aucs(loo.logits, labels),
        aucs(folds.logits, labels, blocks),
        balanced_accuracies(labels, called),
        (labels & called).sum(axis=1),
        called.sum(axis=1),
        loo.fitted.mean(axis=1),
    )
    return pd.DataFrame(dict(zip(NULL, values, strict=True)))


def per_question(labels: Labels, loo: Scores, told: np.ndarray, chance: np.ndarray) -> pd.DataFrame:
    """A row per question: its label, its score and what was chosen without it."""
    return pd.DataFrame(
        {
            "question": labels.questions,
            "id": labels.ids,
            "positive": labels.positive,
            "score": loo.logits[0],
            "probability": chance,
            "called": told,
            "layer": loo.layer[0],
            "dims": loo.dims[0],
            "penalty": loo.penalty[0],
        }
    )
