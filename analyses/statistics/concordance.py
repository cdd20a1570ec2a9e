"""Does something known at every position say at which one an event happens? AUCs with questions as the unit.

An event ends what is looked at: each question has rows up to its event, or to the end of its text. Two AUCs
are needed, since each takes out what the other leaves in:

- **within questions**: the event's position against the earlier positions of the same question. A hard
  question cannot help; that the score drifts along a text can.
- **at the same position**: the question with the event against those at the same position that go on. The
  position cannot help; that some questions score high throughout can.

Half is chance; ties count half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from sst_interp.analyses.statistics.resampling import (
    RESAMPLES,
    Interval,
    cluster_bootstrap,
    questions_words,
    resample_weights,
)

MIN_QUESTIONS = 5
"""Events needed for an AUC at all: with fewer it is said to be not testable."""


class Concordance(NamedTuple):
    """How well one score says where the event is; higher scores are meant to go with the event."""

    within: Interval
    """AUC within questions, mean over the questions with an event that have an earlier position."""
    p_value: float
    """Two-sided; the event's position is drawn anew among the question's positions up to it."""
    across: Interval
    """AUC at the same position, over all pairs of a question with the event there and one that goes on."""


def concordance(
    question: np.ndarray,
    position: np.ndarray,
    event: np.ndarray,
    score: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Concordance:
    """Both AUCs of one score.

    Args:
        question: [row].
        position: [row].
        event: [row], true in at most one row of a question, its last.
        score: [row]; rows that are NaN are left out.
        resamples: question resamples, and redrawn event positions.
        seed: of both.
    """
    there = np.isfinite(score)
    question, position, event, score = (np.asarray(x)[there] for x in (question, position, event, score))
    within, p_value = _within(question, event.astype(bool), score, resamples, seed)
    return Concordance(
        within, p_value, _across(question, position, event.astype(bool), score, resamples, seed)
    )


def _within(
    question: np.ndarray, event: np.ndarray, score: np.ndarray, resamples: int, seed: int
) -> tuple[Interval, float]:
    codes, names = pd.factorize(question)
    length = np.bincount(codes, minlength=len(names))
    usable = (np.bincount(codes, event, len(names)) == 1) & (length > 1)
    keep = usable[codes]
    codes, event, score = codes[keep], event[keep], score[keep]
    if usable.sum() < MIN_QUESTIONS:
        return _too_few(int(usable.sum())), math.nan
    # What the AUC of a question would be if the event were in this row.
    above = (pd.Series(score).groupby(codes).rank().to_numpy() - 1) / (length[codes] - 1)
    found = above[event]
    interval = cluster_bootstrap(np.stack([found, np.ones(len(found))], 1), resamples=resamples, seed=seed)
    order = np.argsort(codes, kind="stable")
    above, length = above[order], length[usable]
    start = np.cumsum(length) - length
    rng = np.random.default_rng(seed)
    drawn = above[start + (rng.random((resamples, len(start))) * length).astype(int)].mean(axis=1)
    far = np.abs(drawn - 0.5) >= abs(found.mean() - 0.5) - 1e-12
    return interval, float((far.sum() + 1) / (resamples + 1))


def _across(
    question: np.ndarray,
    position: np.ndarray,
    event: np.ndarray,
    score: np.ndarray,
    resamples: int,
    seed: int,
) -> Interval:
    """Linear in memory: one position at a time, [resample, question] for those still there."""
    codes, names = pd.factorize(question)
    if not len(names):
        return _too_few(0)
    weights = resample_weights(len(names), resamples, seed)
    totals, exact, seen = np.zeros((resamples, 2)), np.zeros(2), np.zeros(len(names), dtype=bool)
    for at in np.unique(position[event]):
        here, on = (position == at) & event, (position == at) & ~event
        if not on.any():
            continue
        over = (score[here][:, None] > score[on]) + 0.5 * (score[here][:, None] == score[on])
        drawn, others = weights[:, codes[here]].astype(float), weights[:, codes[on]].astype(float)
        totals[:, 0] += ((drawn @ over) * others).sum(axis=1)
        totals[:, 1] += drawn.sum(axis=1) * others.sum(axis=1)
        exact += over.sum(), over.size
        seen[codes[here]] = True
    n = int(seen.sum())
    if n < MIN_QUESTIONS:
        return _too_few(n)
    defined = totals[:, 1] > 0
    low, high = np.quantile(totals[defined, 0] / totals[defined, 1], [0.025, 0.975])
    return Interval(float(exact[0] / exact[1]), float(low), float(high), n)


def _too_few(n: int) -> Interval:
    return Interval(math.nan, math.nan, math.nan, n, reason=f"not testable: only {questions_words(n)} of use")
