"""What out-of-fold scores are worth: rank order, decisions and probabilities, with questions as the unit.

A score above 0 says "positive". The area under the curve (AUC) is the chance that a positive question scores
higher than a negative one, over the pairs whose scores may be compared: all of them if every score comes from
a probe trained on the same shares of both classes, those of the same fold, or those scored by one probe.

The intervals resample questions with the probes as they are. They do not say how another sample of questions
to train on would have turned out, which varies more: a permutation of the labels does (`probe.permutation`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.parts.question_grid import mean_over_questions, share_of_questions
from sst_interp.analyses.statistics.along_texts import over_questions, pair_mean
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval, as_columns, cluster_bootstrap

BINS = 5
"""Bins of predicted probability in a calibration table, with about as many questions each."""


class Pairs(NamedTuple):
    """Which pairs of a positive and a negative question are in order; both [question, question]."""

    higher: np.ndarray
    """How often the positive question (row) scored higher than the negative one (column); ties are half."""
    compared: np.ndarray
    """How often the two were compared."""

    @property
    def share(self) -> float:
        """The AUC; NaN without pairs."""
        total = self.compared.sum()
        return float(self.higher.sum() / total) if total else math.nan


def pairs_in_order(scores: np.ndarray, positive: np.ndarray, fold: np.ndarray | None = None) -> Pairs:
    """Pairs of questions by their scores [question]; with `fold` [question], only those of one fold."""
    compared = positive[:, None] & ~positive[None]
    if fold is not None:
        compared = compared & (fold[:, None] == fold[None])
    gap = scores[:, None] - scores[None]
    return Pairs(np.where(compared, (gap > 0) + 0.5 * (gap == 0), 0.0), compared.astype(float))


def pairs_scored(scores: np.ndarray, positive: np.ndarray) -> Pairs:
    """Pairs that were each scored by one probe, [pair, 2] with the positive question first, in the order of
    `np.flatnonzero`: the negatives of the first positive, of the second ...
    """
    ones, zeros = np.flatnonzero(positive), np.flatnonzero(~positive)
    higher = np.zeros((len(positive), len(positive)))
    compared = higher.copy()
    gap = scores[:, 0] - scores[:, 1]
    where = np.ix_(ones, zeros)
    higher[where] = ((gap > 0) + 0.5 * (gap == 0)).reshape(len(ones), len(zeros))
    compared[where] = 1
    return Pairs(higher, compared)


def auc(pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The AUC, with the probes as they are and questions resampled."""
    return over_questions(len(pairs.higher), lambda w: pair_mean(w, *pairs), resamples, seed)


def auc_difference(one: Pairs, other: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """One AUC minus another of the same questions, resampled together."""
    return over_questions(
        len(one.higher), lambda w: pair_mean(w, *one) - pair_mean(w, *other), resamples, seed
    )


def aucs(scores: np.ndarray, positive: np.ndarray, fold: np.ndarray | None = None) -> np.ndarray:
    """AUCs of many labellings at once: scores and labels [row, question] -> [row]."""
    folds = [None] * len(scores) if fold is None else fold
    rows = zip(scores, positive, folds, strict=True)
    return np.array([pairs_in_order(s, p, f).share for s, p, f in rows])


class Decisions(NamedTuple):
    """What saying "positive" above a score of 0 gets right."""

    sensitivity: Interval
    """Of the positive questions, those called positive (recall) ..."""
    specificity: Interval
    """... and of the negative ones, those not."""
    balanced: Interval
    """Mean of the two; one half for always and for never."""
    called: float
    """Share of all questions called positive."""


def decisions(
    positive: np.ndarray, called: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Decisions:
    """Sensitivity, specificity and their mean: labels and calls [question], bool."""

    def share(right: np.ndarray, of: np.ndarray) -> Interval:
        return share_of_questions(np.where(of, right, np.nan), resamples, seed)

    def balanced(totals: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (totals[..., 0] / totals[..., 1] + totals[..., 2] / totals[..., 3]) / 2

    sums = np.stack([positive & called, positive, ~positive & ~called, ~positive], axis=1)
    return Decisions(
        share(called, positive),
        share(~called, ~positive),
        cluster_bootstrap(sums, balanced, resamples, seed=seed),
        float(called.mean()),
    )


def balanced_accuracies(positive: np.ndarray, called: np.ndarray) -> np.ndarray:
    """Of many labellings at once: [row, question] -> [row]."""
    n1 = positive.sum(axis=1)
    hits, rejected = (positive & called).sum(axis=1), (~positive & ~called).sum(axis=1)
    return (hits / n1 + rejected / (positive.shape[1] - n1)) / 2


def probabilities(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Scores of rebalanced leave-one-out as probabilities [question]: a score of 0 stands for the share of
    positive questions in training, which is the same for every question.
    """
    share = (positive.sum() - 1) / (len(positive) - 2)
    return 1 / (1 + np.exp(-np.clip(scores + np.log(share / (1 - share)), -700, 700)))


def brier(chance: np.ndarray, positive: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean squared distance of probability and outcome, 0 to 1; lower is better."""
    return mean_over_questions((chance - positive) ** 2, resamples, seed)


def calibration(
    chance: np.ndarray, positive: np.ndarray, bins: int = BINS, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Predicted against observed, in bins of about as many questions; equal predictions share a bin.

    Returns:
        Columns predicted (mean), observed with `_low` and `_high` (share positive), questions.
    """
    edges = np.unique(np.quantile(chance, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    place, records = np.searchsorted(edges, chance, side="left"), []
    for k in np.unique(place):
        own = place == k
        observed = share_of_questions(positive[own].astype(float), resamples, seed)
        record = {"predicted": chance[own].mean()} | as_columns(observed=observed)
        records.append(record | {"questions": int(own.sum())})
    return pd.DataFrame(records)
